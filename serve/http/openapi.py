"""Schemas and examples of `/docs` and `/openapi.json` that FastAPI cannot derive: request bodies, responses and problems."""

from typing import Any

from refract.models.prediction import LOW_CONFIDENCE, UNFAMILIAR
from refract.serve.http.errors import MEDIA_TYPE, Problem
from refract.serve.requests.infer_parsing import DATATYPES, OPTIONAL_OUTPUTS, OUTPUTS

_RED = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFElEQVR4nGO8IyfHgA0wYRUdtBIA4FYBKCgCg6AAAAAASUVORK5CYII="
"""A red image of 8 × 8 pixels, a PNG in base64."""

_FILE = {"type": "string", "format": "binary"}
_BASE64 = {"type": "string", "format": "byte"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_BASE64_OR_NULL = {"type": ["string", "null"], "format": "byte"}
_JSON_FORMS = [
    {"type": "object", "required": ["image"], "properties": {"image": _BASE64}},
    {"type": "object", "required": ["images"], "properties": {"images": {"type": "array", "items": _BASE64}}},
    {"type": "object", "properties": {"image": _BASE64, "text": {"type": "string"}}},
    {
        "type": "object",
        "properties": {
            "images": {"type": "array", "items": _BASE64_OR_NULL},
            "texts": {"type": "array", "items": _TEXT_OR_NULL},
        },
    },
]
_ENCODINGS = "The body may be compressed with `Content-Encoding: gzip` or `deflate`."
DESCRIPTION = (
    "Every error is a problem document (RFC 9457, `application/problem+json`). Its `code` is stable and meant for programs; its `detail` "
    "says what is wrong and what is accepted. The header field `X-Request-Id` of a response identifies its line in the access log."
)
"""The description of the API as a whole."""

PREDICT_DESCRIPTION = (
    "Returns one prediction for each image, in the order of the request: `label`, the most probable label; `confidence`; and `top`, the "
    "most probable labels with their probabilities. `labels` lists the labels above their thresholds, for a multi-label model or with "
    "`threshold`. `familiarity` is the fraction of the validation images that are less similar to the training images. `abstain` is true "
    "if a person should decide; `abstain_reasons` then lists `low_confidence`, `unfamiliar` or both. A model with a class hierarchy adds "
    "`backed_off` where the confidence of `label` is too low and a parent is certain enough: the parent's `label`, `confidence` (the sum "
    "over its classes) and `level` (1 for a root). `abstain` stays true then, as it concerns `label`. The response header "
    "`X-Model-Digest` identifies the model; `Server-Timing` states the duration of each stage in milliseconds."
)
PREDICT_BODY = {
    "requestBody": {
        "required": True,
        "description": "One of: the bytes of an image file; plain text; a multipart form, where each part with a `filename` is an image; "
        f"a JSON object with images in base64, texts, or both. {_ENCODINGS}",
        "content": {
            "image/*": {"schema": _FILE},
            "application/octet-stream": {"schema": _FILE},
            "text/plain": {"schema": {"type": "string"}},
            "multipart/form-data": {"schema": {"type": "object", "additionalProperties": _FILE}},
            "application/json": {"schema": {"anyOf": _JSON_FORMS}, "example": {"image": _RED}},
        },
    }
}

EMBED_DESCRIPTION = (
    "Returns one embedding for each image, in the order of the request: the input of the network's last layer, a list of numbers. The "
    "cosine of two embeddings measures how similar the network finds two images. Embeddings of different models are not comparable: "
    "`X-Model-Digest` identifies the model."
)

FEEDBACK_DESCRIPTION = (
    "`id` is the `X-Request-Id` of the response with the prediction. `labels` are the true labels: one for a single-label model, any "
    "number for a multi-label one. `index` is the position of the image in its request, needed if the request had several. A second "
    "feedback replaces the first. The server knows its latest predictions only (`--feedback-keep`, `--feedback-hours`). The response "
    "states the predicted labels, the model, and whether exactly the true labels were predicted."
)
_LABELS = {"type": "array", "items": {"type": "string"}}
_FEEDBACK = {
    "type": "object",
    "required": ["id", "labels"],
    "properties": {"id": {"type": "string"}, "labels": _LABELS, "index": {"type": "integer", "minimum": 0}},
    "additionalProperties": False,
}
FEEDBACK_BODY = {
    "requestBody": {
        "required": True,
        "description": "The id of a prediction, and its true labels.",
        "content": {
            "application/json": {
                "schema": _FEEDBACK,
                "example": {"id": "4f0c2b7e9d1a4c5f8e3b6a7d2c1f0e9a", "labels": ["circle"]},
            }
        },
    }
}

_TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"enum": list(DATATYPES)},
        "datatype": {"enum": sorted(set(DATATYPES.values()))},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "data": {"type": "array"},
        "parameters": {"type": "object"},
    },
}
_INFER = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {
            "type": "array",
            "items": {"type": "object", "properties": {"name": {"enum": [*OUTPUTS, *OPTIONAL_OUTPUTS]}}},
        },
    },
}
_ENCODED = {"inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [1], "data": [_RED]}]}
INFER_BODY = {
    "requestBody": {
        "required": True,
        "description": "The JSON document of the Open Inference Protocol. Binary tensors may follow it; then the header field "
        f"`Inference-Header-Content-Length` states the length of the JSON document in bytes. {_ENCODINGS}",
        "content": {
            "application/json": {"schema": _INFER, "example": _ENCODED},
            "application/octet-stream": {"schema": _FILE},
        },
    }
}

_PREDICTIONS = {
    "model": {"name": "shapes", "digest": "6f1c…"},
    "predictions": [
        {
            "label": "circle",
            "confidence": 0.93,
            "top": [{"label": "circle", "confidence": 0.93}, {"label": "square", "confidence": 0.05}],
            "familiarity": 0.41,
            "abstain": False,
            "explanation": _RED,
            "explanation_method": "occlusion",
        }
    ],
}


_MEANINGS = {
    400: "The body, an image or the JSON document is invalid",
    401: "The API key is missing or invalid",
    404: "The server does not serve this model or version",
    408: "The body did not arrive in time",
    409: "There is no previous model to roll back to, or it fails its self-test",
    413: "The body, an image or the number of images exceeds a limit",
    415: "The Content-Type or the Content-Encoding is not supported",
    422: "A parameter or a member of the JSON document is invalid",
    429: "Too many requests; `Retry-After` states how many seconds to wait",
    503: "The self-test has not passed, or the server is shutting down",
    504: "The request was not answered within the deadline of the server",
}


def _response(problem: dict[str, Any], meaning: str = "") -> dict[str, Any]:
    schema = {"type": "object", "required": list(problem), "properties": {key: {} for key in problem}}
    content = {MEDIA_TYPE: {"schema": schema, "example": problem}}
    return {"description": meaning or _MEANINGS[problem["status"]], "content": content}


_PROBLEMS: dict[int, dict[str, Any]] = {
    problem.status: _response(problem.content)
    for problem in (
        Problem(400, "invalid_image", "the image cannot be decoded"),
        Problem(401, "unauthorized", "this server requires an API key; send the header Authorization: Bearer KEY"),
        Problem(404, "unknown_model", "model 'digits' is not served; this server serves 'shapes'"),
        Problem(408, "body_too_slow", "the whole body did not arrive within 30 s"),
        Problem(409, "no_model_before", "this server has no previous model to roll back to"),
        Problem(413, "body_too_large", "the body is larger than 20971520 bytes"),
        Problem(415, "unsupported_media_type", "Content-Type is 'text/html'; accepted are …"),
        Problem(422, "invalid_parameter", "query top: Input should be a valid integer"),
        Problem(429, "overloaded", "256 requests are in flight, the most allowed; try again later"),
        Problem(503, "not_ready", "the server is shutting down"),
        Problem(504, "deadline_exceeded", "the request was not answered within 10 s"),
    )
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that fails with these HTTP statuses."""
    return {status: _PROBLEMS[status] for status in statuses}


_LABEL = {"label": {"type": "string"}, "confidence": {"type": "number", "minimum": 0, "maximum": 1}}
_BACKED_OFF = {
    "type": "object",
    "description": "Only for a model with a class hierarchy, where the confidence is below `abstain_below`: the parent that is "
    "certain enough, if there is one. `abstain` stays true, as it concerns `label`.",
    "required": ["label", "confidence", "level"],
    "properties": {
        **_LABEL,
        "level": {"type": "integer", "minimum": 1, "description": "1 for a root, 2 for its children"},
    },
}
_PREDICTED = {
    "type": "object",
    "required": ["model", "predictions"],
    "properties": {
        "model": {"type": "object", "properties": {"name": {"type": "string"}, "digest": {"type": "string"}}},
        "predictions": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["label", "confidence", "top"],
                "properties": {
                    **_LABEL,
                    "top": {"type": "array", "items": {"type": "object", "properties": _LABEL}},
                    "labels": {"type": "array", "items": {"type": "string"}},
                    "backed_off": _BACKED_OFF,
                    "familiarity": {"type": "number"},
                    "abstain": {"type": "boolean"},
                    "abstain_reasons": {"type": "array", "items": {"enum": [LOW_CONFIDENCE, UNFAMILIAR]}},
                },
            },
        },
    },
}

PREDICT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One prediction for each image, in the order of the request",
        "content": {"application/json": {"schema": _PREDICTED, "example": _PREDICTIONS}},
    },
    **problems(400, 401, 408, 413, 415, 422, 429, 503, 504),
}

FEEDBACK_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The prediction that was judged",
        "content": {
            "application/json": {
                "example": {
                    "predicted": ["circle"],
                    "correct": True,
                    "model": "6f1c09ab52d7e834",
                    "id": "4f0c2b7e9d1a4c5f8e3b6a7d2c1f0e9a",
                    "index": 0,
                    "replaced": False,
                }
            }
        },
    },
    **problems(400, 401),
    404: _response(
        Problem(404, "unknown_prediction", "no prediction has the id '…'; this server process keeps …").content,
        "The server does not keep this prediction",
    ),
    **problems(408, 413, 415, 422, 429),
    503: _response(
        Problem(503, "feedback_not_stored", "the server cannot store the feedback; send it again later").content,
        "The server cannot write to the folder of `--feedback-dir`",
    ),
}

EMBED_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One embedding for each image, in the order of the request",
        "content": {
            "application/json": {"example": {"model": _PREDICTIONS["model"], "embeddings": [[0.12, 0.0, 1.7]]}}
        },
    },
    **problems(400, 401, 408, 413, 415, 422, 429, 503, 504),
}
