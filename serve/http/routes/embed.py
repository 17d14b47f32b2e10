"""`POST /v1/embed`: the embeddings of images, from the same forward pass as predictions, without the predictions."""

import time
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from refract.serve.http.openapi import EMBED_DESCRIPTION, EMBED_RESPONSES, PREDICT_BODY
from refract.serve.http.routes.predict import FastJson, predictions_of
from refract.serve.requests.body import Bodies
from refract.serve.runtime.service import Service

EMBED = "/v1/embed"


class EmbedOptions(BaseModel):
    """The query parameters of `/v1/embed`."""

    model_config = ConfigDict(extra="forbid")

    tta: Literal["none", "flip"] = Field(
        "none", description="`flip` averages the embeddings of the image and of its horizontal flip, at twice the cost."
    )


def add_embed(app: FastAPI, service: Service, bodies: Bodies, rated: list[Any]) -> None:
    """Add the route. rated: the dependencies of routes that compute predictions."""

    @app.post(
        EMBED,
        summary="Compute the embeddings of one or more images",
        description=EMBED_DESCRIPTION,
        responses=EMBED_RESPONSES,
        dependencies=rated,
        openapi_extra=PREDICT_BODY,
    )
    async def embed(request: Request, options: Annotated[EmbedOptions, Query()]) -> JSONResponse:
        start = time.monotonic()
        results = await predictions_of(service, bodies, request, flipped=options.tta == "flip")
        info, digest = results.bundle.info, results.bundle.digest
        content = {"model": {"name": info.name, "digest": digest}, "embeddings": results.embeddings.tolist()}
        service.metrics.answered(time.monotonic() - start, results.seconds)
        headers = {"Server-Timing": results.timing, "X-Model-Digest": digest[:16]}
        return FastJson(content, headers=headers)
