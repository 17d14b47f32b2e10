"""`POST /v1/predict`: the route that is busy. What happens behind it is the service's."""

import time
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field, ValidationError, create_model
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from serve.answer import prediction
from serve.body import Bodies, unless_gone
from serve.keys import Keys
from serve.openapi import PREDICT_ANSWERS, PREDICT_BODY
from serve.prepare import prepare
from serve.service import Answers, Service

PREDICT = "/v1/predict"


class Asked(BaseModel):
    """What a request asks for beside its pictures; `top` as `_asked` bounds it."""

    top: int
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Answer in `labels` those of at least this probability; for multilabel in place of the bundle's thresholds",
    )
    tta: Literal["none", "flip"] = Field(
        "none", description="flip: the mean answer to the picture and its mirror image, at twice the cost"
    )
    explain: bool = Field(
        False,
        description="With a PNG in base64, of the network's size, to lay over what it saw: where that speaks for the label (Grad-CAM)",
    )


def _asked(num_classes: int) -> type[Asked]:
    about = "How many labels to answer, likeliest first"
    top = Field(min(5, num_classes), ge=1, le=num_classes, description=about)
    return create_model("Asked", __base__=Asked, top=(int, top))


class Direct(APIRoute):
    """A route that FastAPI describes, and does not run: its way from a request to a function costs more than all else of a small picture's
    answer (measured with lenet5, 16 connections: 1,580 a second with it, 2,680 without). The endpoint takes the request alone."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        response = await self.endpoint(Request(scope, receive))
        await response(scope, receive, send)


def add_predict(app: FastAPI, service: Service, keys: Keys | None) -> None:
    """Answer `/v1/predict`."""
    bodies = Bodies(service.limits)
    asked_of = _asked(len(service.engine.bundle.info.labels))  # of all that it will ever serve
    usual = asked_of.model_validate({})

    async def predict(request: Request, asked: Any = None) -> JSONResponse:
        began = time.monotonic()
        if keys:
            await keys.check(request)
        asked = _read(asked_of, request) if request.scope["query_string"] else usual
        with service.admitted():
            async with bodies.read(request) as body:
                kind = request.headers.get("content-type", "")
                prepared = partial(prepare, kind, body)
                work = service.predict(prepared, mirrored=asked.tta == "flip", explained=asked.explain)
                found = await unless_gone(request, work)
        response = _answer(service, asked, found)
        service.metrics.answered(time.monotonic() - began, found.seconds)
        return response

    predict.__annotations__["asked"] = Annotated[asked_of, Query()]  # for the description
    router = APIRouter(route_class=Direct)
    about: dict[str, Any] = {"summary": "Classify one or several images", "openapi_extra": PREDICT_BODY}
    router.add_api_route(PREDICT, predict, methods=["POST"], responses=PREDICT_ANSWERS, **about)
    app.include_router(router)


def _read(asked_of: type[Asked], request: Request) -> Asked:
    try:
        return asked_of.model_validate(dict(request.query_params))
    except ValidationError as err:
        raise RequestValidationError([{**row, "loc": ("query", *row["loc"])} for row in err.errors()]) from err


def _answer(service: Service, asked: Asked, found: Answers) -> JSONResponse:
    info, digest = found.bundle.info, found.bundle.digest
    own = info.thresholds if info.task == "multilabel" else None
    thresholds = own if asked.threshold is None else [asked.threshold] * len(info.labels)
    options: dict[str, Any] = {"top": asked.top, "thresholds": thresholds, "abstain_below": info.abstain_below}
    maps = found.explanations or [None] * len(found.probabilities)
    predictions = [
        prediction(row, info.labels, explanation=heat, **options)
        for row, heat in zip(found.probabilities, maps, strict=True)
    ]
    service.metrics.predicted(found.probabilities, info.labels, sum(p.get("abstain", False) for p in predictions))
    headers = {"Server-Timing": found.timing, "X-Model-Digest": digest[:16]}
    return JSONResponse({"model": {"name": info.name, "digest": digest}, "predictions": predictions}, headers=headers)
