"""The Open Inference Protocol, version 2, which the clients of KServe and Triton use: https://github.com/kserve/open-inference-protocol.

A request has one of two inputs. `images`: RGB pixels of any size, UINT8 [N, height, width, 3]. `encoded`: the bytes of image files,
BYTES [N], in JSON as base64. The outputs are `probabilities`, FP32 [N, labels], and `label`, BYTES [N]. A request may use the extension for
binary tensors; a response is always JSON.
"""

import math
import struct
import time
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from itertools import chain
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from refract.serve.http.errors import RequestError
from refract.serve.http.openapi import INFER_BODY, problems
from refract.serve.requests.body import Bodies, unless_gone
from refract.serve.requests.decoding import EACH, RequestImages, encoded_images, numbered
from refract.serve.requests.limits import Limits
from refract.serve.requests.parsing import SPARE, from_base64, parsed
from refract.serve.runtime.service import Service
from refract.serve.runtime.work import Work, check_version

RESIZE_COST = 0.1
"""The cost of a pixel that is only resized, as a fraction of the cost of one that is also decoded."""

HEADER = "inference-header-content-length"
EXTENSIONS = ["binary_tensor_data", "statistics"]
OUTPUTS = ("probabilities", "label")
INPUTS = (
    {"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
    {"name": "encoded", "datatype": "BYTES", "shape": [-1]},
)


Handler = Callable[..., Awaitable[JSONResponse]]


def add_v2(app: FastAPI, service: Service, bodies: Bodies, allowed: list[Any], rated: list[Any]) -> None:  # noqa: C901 — one function for each route
    """Add the routes below `/v2`. allowed: dependencies of the metadata routes; rated: those of inference. The health routes have none."""

    def check_name(request: Request, name: str) -> None:
        served = service.engine.bundle
        if name != served.info.name:
            message = f"model {name[:40]!r} is not served; this server serves {served.info.name!r}"
            raise RequestError(404, "unknown_model", message)
        check_version(served, request.path_params.get("model_version"))

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
        service.check_alive()
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
        served = service.engine.bundle
        check_name(request, request.path_params.get("name", served.info.name))
        return JSONResponse({"model_stats": [service.statistics.to_dict(served.info.name, served.digest[:16])]})

    @get_model("", "Model metadata: inputs, outputs, labels and version", 401, 404)
    async def metadata(request: Request, name: str) -> JSONResponse:
        check_name(request, name)
        info, digest = service.engine.bundle.info, service.engine.bundle.digest
        outputs = [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(info.labels)]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ]
        model: dict[str, Any] = {"name": name, "versions": [digest[:16]], "platform": "refract"}
        return JSONResponse({**model, "inputs": list(INPUTS), "outputs": outputs, "labels": list(info.labels)})

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
        document: dict[str, Any] = {}
        with service.admitted():
            body = await bodies.read(request)
            try:
                reading = partial(_read, body, request.headers.get(HEADER), service.limits, document)
                work = Work(reading, version=request.path_params.get("model_version"))
                results = await unless_gone(request, service.predict(work))
            finally:
                bodies.release(body)
        rows, labels = results.probabilities, results.bundle.info.labels
        top_labels = [labels[i] for i in rows.argmax(axis=1)]
        outputs = [
            {"name": "probabilities", "datatype": "FP32", "shape": list(rows.shape), "data": rows.ravel().tolist()},
            {"name": "label", "datatype": "BYTES", "shape": [len(top_labels)], "data": top_labels},
        ]
        requested = document["outputs"]
        response: dict[str, Any] = {"model_name": name, "model_version": results.bundle.digest[:16]}
        response |= {"outputs": [output for output in outputs if output["name"] in requested]}
        if isinstance(document.get("id"), str):
            response["id"] = document["id"]
        service.metrics.predicted(rows, labels, 0)
        service.metrics.answered(time.monotonic() - start, results.seconds)
        headers = {"Server-Timing": results.timing, "X-Model-Digest": results.bundle.digest[:16]}
        return JSONResponse(response, headers=headers)


def _read(body: bytes, json_length: str | None, limits: Limits, rest: dict[str, Any]) -> RequestImages:
    """Return the images of a request. json_length: the value of HEADER; rest: receives the members of the JSON document other than
    `inputs`, which may be large and are not stored."""
    document, binary = _parts(body, json_length, limits)
    document["outputs"] = _outputs(document.get("outputs"))
    images = _images(document.pop("inputs", None), binary, limits)
    rest.update(document)
    return images


def _outputs(requested: Any) -> tuple[str, ...]:
    """Return the names of the requested outputs; all of them if the request names none."""
    if not isinstance(requested, list | None):
        raise _invalid("`outputs` must be a list")
    names = [row.get("name") if isinstance(row, dict) else row for row in requested or []]
    if unknown := [name for name in names if name not in OUTPUTS]:
        raise _invalid(f"unknown output {str(unknown[0])[:40]!r}; known: `probabilities`, `label`")
    return tuple(name for name in OUTPUTS if name in names) or OUTPUTS


def _parts(body: bytes, json_length: str | None, limits: Limits) -> tuple[dict[str, Any], bytes]:
    """Return (the JSON document, the binary tensors after it)."""
    if json_length is not None and not _within(json_length, len(body)):
        raise RequestError(400, "invalid_request", f"{HEADER} is not the length of the JSON part of the body")
    length = len(body) if json_length is None else int(json_length)
    document = parsed(body[:length], objects=SPARE, values=3 * limits.max_total_pixels + SPARE)
    if not isinstance(document, dict):
        raise RequestError(422, "invalid_request", "the body must be a JSON object with `inputs`")
    return document, body[length:]


def _within(text: str, maximum: int) -> bool:
    """Whether `text` is a whole number of at most `maximum`. `int` raises ValueError for thousands of digits."""
    return text.isdecimal() and len(text) < 20 and int(text) <= maximum


def _images(inputs: Any, binary: bytes, limits: Limits) -> RequestImages:
    """Read the one input of a request. RequestError unless it is one of INPUTS."""
    match inputs:
        case [{"name": "images", "datatype": "UINT8", "shape": [*shape]} as tensor]:
            images = _tensor(tensor, shape, binary, limits)
            cost = RESIZE_COST * math.prod(shape[:3]) / 1e6 + EACH * len(images)
            return RequestImages(
                len(images),
                cost,
                lambda preprocess, _: np.stack([preprocess(image) for image in images]),
                sides=[image.shape[:2] for image in images],
            )
        case [{"name": "encoded", "datatype": "BYTES", "shape": [*shape]} as tensor]:
            files = _files(tensor, binary, limits)
            if shape != [len(files)]:
                raise _invalid(f"`encoded` has shape {str(shape)[:40]} but {len(files)} elements")
            return encoded_images(files, numbered(len(files)), limits)
    raise _invalid("`inputs` must be one tensor: `images`, UINT8 [N, height, width, 3], or `encoded`, BYTES [N]")


def _tensor(tensor: dict[str, Any], shape: list[Any], binary: bytes, limits: Limits) -> np.ndarray:
    if len(shape) != 4 or any(type(side) is not int or side < 1 for side in shape) or shape[3] != 3:
        raise _invalid(f"`images` has shape {str(shape)[:40]}; expected [N, height, width, 3]")
    if shape[0] > limits.max_images:
        raise RequestError(413, "too_many_images", f"{shape[0]} images in one request; at most {limits.max_images}")
    if shape[1] * shape[2] > limits.max_pixels or math.prod(shape[:3]) > limits.max_total_pixels:
        limit = f"at most {limits.max_pixels:,} pixels in one and {limits.max_total_pixels:,} in all"
        detail = f"{shape[0]} images of {shape[1]} × {shape[2]} pixels are too large; {limit}"
        raise RequestError(413, "images_too_large", detail)
    size = _binary_size(tensor, binary)
    if size is not None:
        values = np.frombuffer(binary[:size], np.uint8)
    else:
        try:
            numbers = np.array(tensor.get("data"))
        except ValueError as err:  # rows of different lengths
            raise _invalid("the nested lists in `data` of `images` have different lengths") from err
        if _has_booleans(tensor.get("data"), numbers):
            message = "`data` of `images` contains booleans; expected whole numbers in 0 … 255"
            raise RequestError(400, "invalid_request", message)
        if numbers.dtype.kind not in "iu" or (numbers.size and (numbers.min() < 0 or numbers.max() > 255)):
            raise _invalid("`data` of `images` must be whole numbers in 0 … 255")
        values = numbers.ravel().astype(np.uint8)
    if values.size != math.prod(shape):
        raise _invalid(f"`images` has shape {shape} but {values.size} values")
    return values.reshape(shape)


def _files(tensor: dict[str, Any], binary: bytes, limits: Limits) -> list[bytes]:
    size = _binary_size(tensor, binary)
    if size is None:
        texts = tensor.get("data")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise _invalid("`data` of `encoded` must be a list of at least one base64 string")
        _check_count(len(texts), limits)
        try:
            return [from_base64(text) for text in texts]
        except ValueError as err:
            raise RequestError(400, "invalid_base64", "an element of `encoded` is not valid base64") from err
    files, offset, end = [], 0, min(size, len(binary))
    while offset + 4 <= end:  # each element follows its length
        (length,) = struct.unpack_from("<I", binary, offset)
        files.append(binary[offset + 4 : offset + 4 + length])
        offset += 4 + length
        _check_count(len(files), limits)
    if offset != end or end != size or not files:
        raise _invalid("the binary data of `encoded` must be elements, each after its length as 4 bytes, little-endian")
    return files


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_images:
        raise RequestError(413, "too_many_images", f"more than {limits.max_images} images in one request; send fewer")


def _has_booleans(data: Any, numbers: np.ndarray) -> bool:
    """Whether the nested lists that became `numbers` contain true or false, which NumPy converts to 1 and 0 next to numbers."""
    if numbers.dtype.kind not in "biuf":
        return False
    for _ in range(numbers.ndim - 1):
        data = chain.from_iterable(data)
    return numbers.ndim > 0 and bool in set(map(type, data))


def _binary_size(tensor: dict[str, Any], binary: bytes) -> int | None:
    """Return the size of the input in `binary`, which must hold nothing else, in bytes; None if its data are in the JSON document."""
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None and (type(size) is not int or size < 0):
        raise RequestError(400, "invalid_request", "`binary_data_size` must be a whole number of bytes, at least 0")
    if len(binary) > (size or 0):
        message = f"{len(binary)} bytes follow the JSON document, but `binary_data_size` is {size or 0}"
        raise RequestError(400, "invalid_request", message)
    return size


def _invalid(message: str) -> RequestError:
    return RequestError(422, "invalid_request", message)
