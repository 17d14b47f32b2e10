"""What `/docs` and `/openapi.json` tell of `POST /v1/predict`: its forms of bodies and its answers, each with an example."""

from typing import Any

_RED = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFElEQVR4nGO8IyfHgA0wYRUdtBIA4FYBKCgCg6AAAAAASUVORK5CYII="
"""A red picture of 8 × 8 pixels, a PNG in base64."""

_FILE = {"type": "string", "format": "binary"}
_BASE64 = {"type": "string", "format": "byte"}
_JSON_FORMS = [
    {"type": "object", "required": ["image"], "properties": {"image": _BASE64}},
    {"type": "object", "required": ["images"], "properties": {"images": {"type": "array", "items": _BASE64}}},
]
PREDICT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": _FILE},
            "application/octet-stream": {"schema": _FILE},
            "multipart/form-data": {"schema": {"type": "object", "additionalProperties": _FILE}},
            "application/json": {"schema": {"oneOf": _JSON_FORMS}, "example": {"image": _RED}},
        },
    }
}

_ANSWER = {
    "model": {"name": "shapes", "digest": "6f1c…"},
    "predictions": [
        {
            "label": "circle",
            "confidence": 0.93,
            "top": [{"label": "circle", "confidence": 0.93}, {"label": "square", "confidence": 0.05}],
            "abstain": False,
        }
    ],
}


def _problem(status: int, title: str, code: str, detail: str) -> dict[str, Any]:
    example = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code}
    schema = {"type": "object", "required": list(example), "properties": {key: {} for key in example}}
    return {"description": title, "content": {"application/problem+json": {"schema": schema, "example": example}}}


PREDICT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "An answer for each image, in the order sent",
        "content": {"application/json": {"example": _ANSWER}},
    },
    400: _problem(400, "Bad Request", "invalid_image", "the image cannot be read"),
    413: _problem(413, "Content Too Large", "body_too_large", "the body is larger than 20971520 bytes"),
    415: _problem(
        415, "Unsupported Media Type", "unsupported_media_type", "Content-Type is 'text/plain'; accepted are …"
    ),
    422: _problem(422, "Unprocessable Content", "invalid_parameter", "query top: Input should be a valid integer"),
    429: _problem(429, "Too Many Requests", "overloaded", "256 requests are being answered already; try again later"),
    503: _problem(
        503, "Service Unavailable", "not_ready", "the self-test has not passed yet, or the server is going down"
    ),
    504: _problem(504, "Gateway Timeout", "deadline_exceeded", "there was no answer within 10 s"),
}
