"""`POST /v1/predict`: the route that carries the load. It reads the request and hands it to the service."""

import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.datastructures import QueryParams
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from refract.models.prediction import UNFAMILIAR, confidences, prediction
from refract.serve.errors import RequestError
from refract.serve.http.auth import ApiKeys
from refract.serve.http.base_path import route_path
from refract.serve.http.errors import ProblemResponder
from refract.serve.http.openapi import PREDICT_BODY, PREDICT_DESCRIPTION, PREDICT_RESPONSES
from refract.serve.requests.body import Bodies, unless_gone
from refract.serve.requests.decoding import is_quick
from refract.serve.requests.protocols import PredictBody
from refract.serve.runtime.service import Service
from refract.serve.runtime.work import Predictions, Work

logger = logging.getLogger(__name__)

PREDICT = "/v1/predict"
MOST_SIMILAR = 20
"""The most similar training images of one prediction: each has a thumbnail of a kilobyte."""

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class FastJson(JSONResponse):
    """A JSON response that shares one encoder; Starlette creates an encoder for each response."""

    def render(self, content: Any) -> bytes:
        return _JSON.encode(content).encode()


class PredictOptions(BaseModel):
    """The query parameters of `/v1/predict`. An unknown parameter is rejected, as it may be misspelt. `_options_model` sets the default
    of `top`."""

    model_config = ConfigDict(extra="forbid")

    top: int
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Add `labels` to each prediction: the labels whose probability is at least this threshold. For a multi-label model it "
        "replaces the thresholds of the bundle.",
    )
    tta: Literal["none", "flip"] = Field(
        "none",
        description="Test-time augmentation. `flip` averages the logits of the image and of its horizontal flip, at twice the cost.",
    )
    explain: bool = Field(
        False,
        description="Add `explanation` to each prediction: a heat map of the regions that support the predicted label, as a PNG in base64. "
        "It has the size of the network's input and covers the part of the image that the network saw. `explanation_method` names the "
        "method. If no map can be computed, `explanation_problem` gives its `code` and `detail` instead.",
    )
    embed: bool = Field(
        False,
        description="Add `embedding` to each prediction: the input of the network's last layer, a list of numbers. The cosine of two "
        "embeddings measures how similar the network finds two images.",
    )
    similar: int = Field(
        0,
        ge=0,
        le=MOST_SIMILAR,
        description="Add `similar` to each prediction: this many training images, the most similar first, with `path`, `labels`, "
        "`similarity` (the cosine of the embeddings) and `thumbnail`, a JPEG in base64 or null. The server must be started with "
        "`--similar`.",
    )


def _options_model(num_classes: int) -> type[PredictOptions]:
    description = f"How many labels each prediction lists, most probable first. A larger number than {num_classes} lists all {num_classes}."
    top = Field(min(5, num_classes), ge=1, description=description)
    return create_model("PredictOptions", __base__=PredictOptions, top=(int, top))


Endpoint = Callable[[Request], Awaitable[Response]]


class DirectRoute:
    """ASGI middleware that calls the endpoint of one route without FastAPI's routing and dependency injection. For a small image these
    cost more than all the rest of the request. FastAPI still describes the route in `/docs`."""

    def __init__(self, app: ASGIApp, path: str, endpoint: Endpoint, respond: ProblemResponder) -> None:
        self._app, self._path, self._endpoint, self._respond = app, path, endpoint, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Starlette's routes also match a path that ends with a line feed.
        if scope["type"] != "http" or route_path(scope).rstrip("\n") != self._path or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self._endpoint(request)
        except Exception as err:
            response = self._respond(request, err)
            if response.status_code == 500:
                logger.exception("a request failed")
        await response(scope, receive, send)


async def predictions_of(
    service: Service, bodies: Bodies, request: Request, *, flipped: bool, explained: bool = False
) -> Predictions:
    """Read the body of `request`, and predict it."""
    with service.admitted():
        body = await bodies.read(request)
        try:
            content_type = request.headers.get("content-type", "")
            work = Work(
                PredictBody(body, content_type),
                flipped=flipped,
                explained=explained,
                quick=is_quick(content_type, body),
                request_id=request.scope["state"]["request_id"],
            )
            return await unless_gone(request, service.predict(work))
        finally:
            bodies.release(body)


def add_predict(app: FastAPI, service: Service, bodies: Bodies, keys: ApiKeys | None, allowed: list[Any]) -> Endpoint:
    """Describe `/v1/predict` in `app`. Returns the endpoint, for `DirectRoute`."""
    # A hot swap keeps the labels, so their number holds for every later model.
    options_model = _options_model(len(service.models.engine.bundle.info.labels))

    @lru_cache(maxsize=64)  # most clients of a server send the same query string
    def parse(query: bytes) -> PredictOptions:
        return _parse(options_model, query)

    async def predict(request: Request, options: Any = None) -> JSONResponse:
        start = time.monotonic()
        if keys:
            await keys.check(request)
        options = parse(request.scope["query_string"])
        results = await predictions_of(
            service, bodies, request, flipped=options.tta == "flip", explained=options.explain
        )
        response = _response(service, options, results)
        if service.recent:
            service.recent.record(request.scope["state"]["request_id"], results.bundle, results.probabilities)
        service.metrics.answered(time.monotonic() - start, results.seconds)
        return response

    predict.__annotations__["options"] = Annotated[options_model, Query()]  # for the OpenAPI document
    app.add_api_route(
        PREDICT,
        predict,
        methods=["POST"],
        summary="Classify one or more images",
        description=PREDICT_DESCRIPTION,
        responses=PREDICT_RESPONSES,
        dependencies=allowed,
        openapi_extra=PREDICT_BODY,
    )
    return predict


def _parse(options_model: type[PredictOptions], query: bytes) -> PredictOptions:
    try:
        return options_model.model_validate(dict(QueryParams(query)))
    except ValidationError as err:
        raise RequestValidationError([_error(row, options_model) for row in err.errors()]) from err


def _error(row: Mapping[str, Any], options_model: type[PredictOptions]) -> dict[str, Any]:
    unknown = row["type"] == "extra_forbidden"
    message = f"unknown parameter; known: {', '.join(options_model.model_fields)}" if unknown else row["msg"]
    return {**row, "msg": message, "loc": ("query", *row["loc"])}


def _response(service: Service, options: PredictOptions, results: Predictions) -> JSONResponse:
    info, digest = results.bundle.info, results.bundle.digest
    bundle_thresholds = info.thresholds if info.task == "multilabel" else None
    thresholds = bundle_thresholds if options.threshold is None else [options.threshold] * len(info.labels)
    maps = results.explanations or [None] * len(results.probabilities)
    cut = results.cut or [False] * len(results.probabilities)
    # None: the confidence of a single-label prediction is the probability of its most probable label.
    row_confidences: list[Any] = [None] * len(results.probabilities)
    if info.task == "multilabel":
        row_confidences = confidences(results.probabilities, info.task, info.thresholds).tolist()
    back_offs = info.back_offs(results.probabilities)
    predictions = [
        prediction(
            row,
            info.labels,
            top=options.top,
            thresholds=thresholds,
            abstain_below=info.abstain_below,
            confidence=confidence,
            backed_off=backed_off,
            explanation=heat_map,
            cut=is_cut,
            familiarity=familiarity,
            min_familiarity=service.min_familiarity,
        )
        for row, confidence, backed_off, heat_map, is_cut, familiarity in zip(
            results.probabilities,
            row_confidences,
            back_offs,
            maps,
            cut,
            results.outputs["familiarity"].tolist(),
            strict=True,
        )
    ]
    if options.embed:
        for row, embedding in zip(predictions, results.embeddings.tolist(), strict=True):
            row["embedding"] = embedding
    abstained = sum(row.get("abstain", False) for row in predictions)
    if options.similar:
        if not service.shows_similar:
            raise RequestError(
                403,
                "similar_disabled",
                "this server shows no training images; start it with --similar, or omit `similar`",
            )
        for row, images in zip(predictions, results.similar(options.similar), strict=True):
            row["similar"] = images
    unfamiliar = sum(UNFAMILIAR in row.get("abstain_reasons", ()) for row in predictions)
    service.metrics.predicted(results.probabilities, info.labels, abstained, unfamiliar)
    headers = {"Server-Timing": results.timing, "X-Model-Digest": digest[:16]}
    return FastJson({"model": {"name": info.name, "digest": digest}, "predictions": predictions}, headers=headers)
