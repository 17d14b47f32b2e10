"""The routes of the Open Inference Protocol, version 2, over HTTP. Its inputs and outputs: `refract.serve.runtime.open_inference`.

A request may use the extension for binary tensors; a response is always JSON.
"""

import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from refract.serve.http.openapi import INFER_BODY, problems
from refract.serve.requests.body import Bodies, unless_gone
from refract.serve.requests.infer_parsing import HEADER
from refract.serve.requests.model_name import check_model
from refract.serve.requests.protocols import InferBody
from refract.serve.runtime.open_inference import (
    PLATFORM,
    Tensor,
    inputs_of,
    outputs_of,
    record,
    tensors_of,
)
from refract.serve.runtime.service import Service
from refract.serve.runtime.work import Work

EXTENSIONS = ["binary_tensor_data", "statistics"]

Handler = Callable[..., Awaitable[JSONResponse]]


def add_v2(app: FastAPI, service: Service, bodies: Bodies, allowed: list[Any], rated: list[Any]) -> None:
    """Add the routes below `/v2`. allowed: dependencies of the metadata routes; rated: those of inference. The health routes have none."""

    def check_name(request: Request, name: str) -> None:
        check_model(service.models.engine.bundle, name, request.path_params.get("model_version"))

    @app.get("/v2", summary="Server metadata: name, version and protocol extensions", tags=["v2"])
    async def server() -> JSONResponse:
        return JSONResponse({"name": "refract", "version": version("refract"), "extensions": EXTENSIONS})

    @app.get(
        "/v2/health/live",
        summary="Liveness: the process responds, and the self-test has not failed twice in a row",
        tags=["v2"],
        responses=problems(503),
    )
    async def live() -> JSONResponse:
        service.models.check_alive()
        return JSONResponse({"live": True})

    @app.get(
        "/v2/health/ready",
        summary="Readiness: the model passes its self-test, and the server is not shutting down",
        tags=["v2"],
        responses=problems(503),
    )
    async def ready() -> JSONResponse:
        service.check_accepting()
        return JSONResponse({"ready": True})

    def get_model(suffix: str, summary: str, *statuses: int) -> Callable[[Handler], Handler]:
        """Add a GET route of a model, with and without its version. statuses: HTTP statuses of its problems."""

        def add(handler: Handler) -> Handler:
            path, responses = f"/v2/models/{{name}}{suffix}", problems(*statuses)
            app.get(path, summary=summary, tags=["v2"], dependencies=allowed, responses=responses)(handler)
            versioned = f"/v2/models/{{name}}/versions/{{model_version}}{suffix}"
            return app.get(versioned, include_in_schema=False, dependencies=allowed)(handler)

        return add

    @get_model("/ready", "Readiness of the named model", 401, 404, 503)
    async def model_ready(request: Request, name: str) -> JSONResponse:
        check_name(request, name)
        service.check_accepting()
        return JSONResponse({"name": name, "ready": True})

    @app.get("/v2/models/stats", include_in_schema=False, dependencies=allowed)
    @get_model("/stats", "Numbers and durations of requests and batches since this version is served", 401, 404)
    async def statistics(request: Request) -> JSONResponse:
        served = service.models.engine.bundle
        check_name(request, request.path_params.get("name", served.info.name))
        return JSONResponse(
            {"model_stats": [service.models.champion.statistics.to_dict(served.info.name, served.digest[:16])]}
        )

    @get_model("", "Model metadata: inputs, outputs, labels and version", 401, 404)
    async def metadata(request: Request, name: str) -> JSONResponse:
        check_name(request, name)
        engine = service.models.engine
        bundle = engine.bundle
        model: dict[str, Any] = {"name": name, "versions": [bundle.digest[:16]], "platform": PLATFORM}
        inputs, outputs = ([row._asdict() for row in rows] for rows in (inputs_of(engine), outputs_of(engine)))
        return JSONResponse({**model, "inputs": inputs, "outputs": outputs, "labels": list(bundle.info.labels)})

    @app.post("/v2/models/{name}/versions/{model_version}/infer", include_in_schema=False, dependencies=rated)
    @app.post(
        "/v2/models/{name}/infer",
        summary="Classify tensors or encoded images",
        tags=["v2"],
        dependencies=rated,
        openapi_extra=INFER_BODY,
        responses=problems(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
    )
    async def infer(name: str, request: Request) -> JSONResponse:
        check_name(request, name)
        start = time.monotonic()
        with service.admitted():
            body = await bodies.read(request)
            try:
                inference = InferBody(body, request.headers.get(HEADER))
                request_id = request.state.request_id
                work = Work(inference, version=request.path_params.get("model_version"), request_id=request_id)
                results = await unless_gone(request, service.predict(work))
            finally:
                bodies.release(body)
        response: dict[str, Any] = {"model_name": name, "model_version": results.bundle.digest[:16]}
        response |= {"outputs": list(map(_json, tensors_of(results)))}
        if results.request.id is not None:
            response["id"] = results.request.id
        record(service, request_id, results, time.monotonic() - start)
        headers = {"Server-Timing": results.timing, "X-Model-Digest": results.bundle.digest[:16]}
        return JSONResponse(response, headers=headers)


def _json(tensor: Tensor) -> dict[str, Any]:
    values = tensor.values
    data = values if isinstance(values, list) else values.ravel().tolist()
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape, "data": data}
