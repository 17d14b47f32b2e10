"""`POST /v1/predict`: the route that is busy. What happens behind it is the service's."""

import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.datastructures import QueryParams
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from refract.models.prediction import confidences, prediction
from refract.serve.http.auth import ApiKeys
from refract.serve.http.base_path import route_path
from refract.serve.http.errors import Refused
from refract.serve.http.openapi import PREDICT_ANSWERS, PREDICT_BODY
from refract.serve.requests.body import Bodies, unless_gone
from refract.serve.requests.decoding import is_quick, read
from refract.serve.runtime.service import Service
from refract.serve.runtime.work import Predictions, Work

logger = logging.getLogger(__name__)

PREDICT = "/v1/predict"

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class _Json(JSONResponse):
    """Starlette makes an encoder for each."""

    def render(self, content: Any) -> bytes:
        return _JSON.encode(content).encode()


class Asked(BaseModel):
    """What a request asks for beside its images; `top` as `_asked` bounds it. An unknown name is refused, as it may be misspelt."""

    model_config = ConfigDict(extra="forbid")

    top: int
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Answer in `labels` those of at least this probability; for multilabel in place of the bundle's thresholds",
    )
    tta: Literal["none", "flip"] = Field(
        "none", description="flip: the mean answer to the image and its mirror image, at twice the cost"
    )
    explain: bool = Field(
        False,
        description="Add `explanation`, a heat map of where the image speaks for the label: a PNG in base64 of the network's size, to lay "
        "over what the network saw. `explanation_method` names the method. Where there is no map, `explanation_problem` says why",
    )


def _asked(num_classes: int) -> type[Asked]:
    about = f"How many labels to answer, likeliest first; all {num_classes} if more are asked for"
    top = Field(min(5, num_classes), ge=1, description=about)
    return create_model("Asked", __base__=Asked, top=(int, top))


Endpoint = Callable[[Request], Awaitable[Response]]


class Direct:
    """ASGI middleware that answers one route itself. FastAPI describes it, but its way from a request to a function costs more than all
    else of a small image's answer."""

    def __init__(self, app: ASGIApp, path: str, endpoint: Endpoint, refused: Refused) -> None:
        self._app, self._path, self._endpoint, self._refused = app, path, endpoint, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Starlette's routes match a path with a line feed at its end, too.
        if scope["type"] != "http" or route_path(scope).rstrip("\n") != self._path or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self._endpoint(request)
        except Exception as err:
            response = self._refused(request, err)
            if response.status_code == 500:
                logger.exception("a request failed")
        await response(scope, receive, send)


def add_predict(app: FastAPI, service: Service, bodies: Bodies, keys: ApiKeys | None, allowed: list[Any]) -> Endpoint:
    """Describe `/v1/predict` in `app`. Returns what answers it, for `Direct`."""
    asked_of = _asked(len(service.engine.bundle.info.labels))  # of all that it will ever serve

    @lru_cache(maxsize=64)  # the clients of a server ask for the same
    def asked_by(query: bytes) -> Asked:
        return _read(asked_of, query)

    async def predict(request: Request, asked: Any = None) -> JSONResponse:
        began = time.monotonic()
        if keys:
            await keys.check(request)
        asked = asked_by(request.scope["query_string"])
        with service.admitted():
            body = await bodies.read(request)
            try:
                kind = request.headers.get("content-type", "")
                reading = partial(read, kind, body, service.limits)
                work = Work(reading, asked.tta == "flip", asked.explain, is_quick(kind, body))
                found = await unless_gone(request, service.predict(work))
            finally:
                bodies.release(body)
        response = _answer(service, asked, found)
        service.metrics.answered(time.monotonic() - began, found.seconds)
        return response

    predict.__annotations__["asked"] = Annotated[asked_of, Query()]  # for the description
    about: dict[str, Any] = {"summary": "Classify one or several images", "openapi_extra": PREDICT_BODY}
    app.add_api_route(PREDICT, predict, methods=["POST"], responses=PREDICT_ANSWERS, dependencies=allowed, **about)
    return predict


def _read(asked_of: type[Asked], query: bytes) -> Asked:
    try:
        return asked_of.model_validate(dict(QueryParams(query)))
    except ValidationError as err:
        raise RequestValidationError([_problem(row, asked_of) for row in err.errors()]) from err


def _problem(row: Mapping[str, Any], asked_of: type[Asked]) -> dict[str, Any]:
    unknown = row["type"] == "extra_forbidden"
    message = f"no such parameter; known: {', '.join(asked_of.model_fields)}" if unknown else row["msg"]
    return {**row, "msg": message, "loc": ("query", *row["loc"])}


def _answer(service: Service, asked: Asked, found: Predictions) -> JSONResponse:
    info, digest = found.bundle.info, found.bundle.digest
    own = info.thresholds if info.task == "multilabel" else None
    thresholds = own if asked.threshold is None else [asked.threshold] * len(info.labels)
    options: dict[str, Any] = {"top": asked.top, "thresholds": thresholds, "abstain_below": info.abstain_below}
    maps = found.explanations or [None] * len(found.probabilities)
    cut = found.cut or [False] * len(found.probabilities)
    sure: list[Any] = [None] * len(found.probabilities)  # of one label, that of the likeliest
    if info.task == "multilabel":
        sure = confidences(found.probabilities, info.task, info.thresholds).tolist()
    predictions = [
        prediction(row, info.labels, confidence=own_sure, explanation=heat, cut=short, **options)
        for row, own_sure, heat, short in zip(found.probabilities, sure, maps, cut, strict=True)
    ]
    service.metrics.predicted(found.probabilities, info.labels, sum(p.get("abstain", False) for p in predictions))
    headers = {"Server-Timing": found.timing, "X-Model-Digest": digest[:16]}
    return _Json({"model": {"name": info.name, "digest": digest}, "predictions": predictions}, headers=headers)
