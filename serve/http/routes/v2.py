"""The Open Inference Protocol, version 2, as KServe and Triton's clients speak it: https://github.com/kserve/open-inference-protocol.

One model, two forms of input: `images`, UINT8 of shape [N, height, width, 3], pixels of any size in RGB; or `encoded`, BYTES of shape [N],
the bytes of image files, in JSON as base64. Outputs: `probabilities`, FP32 [N, labels], and `label`, BYTES [N]. The extension for binary
tensors in a request is understood; answers are JSON.
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

RESIZING = 0.1
"""What a pixel costs that need not be decoded, as a share of one that must."""

HEADER = "inference-header-content-length"
EXTENSIONS = ["binary_tensor_data", "statistics"]
OUTPUTS = ("probabilities", "label")
INPUTS = (
    {"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
    {"name": "encoded", "datatype": "BYTES", "shape": [-1]},
)


Handler = Callable[..., Awaitable[JSONResponse]]


def add_v2(app: FastAPI, service: Service, bodies: Bodies, allowed: list[Any], rated: list[Any]) -> None:
    """The routes below `/v2`; its health routes ask for no key. rated: for inference."""

    def check_name(request: Request, name: str) -> None:
        served = service.engine.bundle
        if name != served.info.name:
            raise RequestError(404, "unknown_model", f"there is no model of this name; served is {served.info.name!r}")
        check_version(served, request.path_params.get("model_version"))

    @app.get("/v2", summary="The server", tags=["v2"])
    async def server() -> JSONResponse:
        return JSONResponse({"name": "refract", "version": version("refract"), "extensions": EXTENSIONS})

    @app.get(
        "/v2/health/live",
        summary="The process answers, and its model is not lost",
        tags=["v2"],
        responses=problems(503),
    )
    async def live() -> JSONResponse:
        service.check_alive()
        return JSONResponse({"live": True})

    @app.get(
        "/v2/health/ready",
        summary="The golden images gave their stored answers again",
        tags=["v2"],
        responses=problems(503),
    )
    async def ready() -> JSONResponse:
        service.check_accepting()
        return JSONResponse({"ready": True})

    def of_a_model(suffix: str, summary: str, *codes: int) -> Callable[[Handler], Handler]:
        """Serve GET of a model, with and without its version. codes: of the refusals."""

        def served(handler: Handler) -> Handler:
            path, refusals = f"/v2/models/{{name}}{suffix}", problems(*codes)
            app.get(path, summary=summary, tags=["v2"], dependencies=allowed, responses=refusals)(handler)
            versioned = f"/v2/models/{{name}}/versions/{{model_version}}{suffix}"
            return app.get(versioned, include_in_schema=False, dependencies=allowed)(handler)

        return served

    @of_a_model("/ready", "The same, by the model's name", 401, 404, 503)
    async def model_ready(request: Request, name: str) -> JSONResponse:
        check_name(request, name)
        service.check_accepting()
        return JSONResponse({"name": name, "ready": True})

    @app.get("/v2/models/stats", include_in_schema=False, dependencies=allowed)
    @of_a_model("/stats", "Requests and batches, and the time that they took, since this version is served", 401, 404)
    async def statistics(request: Request) -> JSONResponse:
        served = service.engine.bundle
        check_name(request, request.path_params.get("name", served.info.name))
        return JSONResponse({"model_stats": [service.statistics.to_dict(served.info.name, served.digest[:16])]})

    @of_a_model("", "Inputs and outputs", 401, 404)
    async def metadata(request: Request, name: str) -> JSONResponse:
        check_name(request, name)
        info, digest = service.engine.bundle.info, service.engine.bundle.digest
        outputs = [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(info.labels)]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ]
        own: dict[str, Any] = {"name": name, "versions": [digest[:16]], "platform": "refract"}
        return JSONResponse({**own, "inputs": list(INPUTS), "outputs": outputs, "labels": list(info.labels)})

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
        began = time.monotonic()
        document: dict[str, Any] = {}
        with service.admitted():
            body = await bodies.read(request)
            try:
                reading = partial(_read, body, request.headers.get(HEADER), service.limits, document)
                work = Work(reading, version=request.path_params.get("model_version"))
                found = await unless_gone(request, service.predict(work))
            finally:
                bodies.release(body)
        rows, labels = found.probabilities, found.bundle.info.labels
        best = [labels[i] for i in rows.argmax(axis=1)]
        outputs = [
            {"name": "probabilities", "datatype": "FP32", "shape": list(rows.shape), "data": rows.ravel().tolist()},
            {"name": "label", "datatype": "BYTES", "shape": [len(best)], "data": best},
        ]
        wanted = document["outputs"]
        answer: dict[str, Any] = {"model_name": name, "model_version": found.bundle.digest[:16]}
        answer |= {"outputs": [output for output in outputs if output["name"] in wanted]}
        if isinstance(document.get("id"), str):
            answer["id"] = document["id"]
        service.metrics.predicted(rows, labels, 0)
        service.metrics.answered(time.monotonic() - began, found.seconds)
        headers = {"Server-Timing": found.timing, "X-Model-Digest": found.bundle.digest[:16]}
        return JSONResponse(answer, headers=headers)


def _read(body: bytes, announced: str | None, limits: Limits, rest: dict[str, Any]) -> RequestImages:
    """rest: takes what the JSON document has beside its inputs, which may be large, and are not kept."""
    document, binary = _parts(body, announced, limits)
    document["outputs"] = _outputs(document.get("outputs"))
    found = _images(document.pop("inputs", None), binary, limits)
    rest.update(document)
    return found


def _outputs(asked: Any) -> tuple[str, ...]:
    """The names of those that are wanted: all, where none is named."""
    if not isinstance(asked, list | None):
        raise _wrong("outputs is no list")
    names = [row.get("name") if isinstance(row, dict) else row for row in asked or []]
    if strange := [name for name in names if name not in OUTPUTS]:
        raise _wrong(f"there is no output {str(strange[0])[:40]!r}, but `probabilities` and `label`")
    return tuple(own for own in OUTPUTS if own in names) or OUTPUTS


def _parts(body: bytes, announced: str | None, limits: Limits) -> tuple[dict[str, Any], bytes]:
    """(the JSON document, the binary tensors after it)"""
    if announced is not None and not _within(announced, len(body)):
        raise RequestError(400, "invalid_request", f"{HEADER} is not the length of the JSON part of the body")
    length = len(body) if announced is None else int(announced)
    document = parsed(body[:length], objects=SPARE, values=3 * limits.max_total_pixels + SPARE)
    if not isinstance(document, dict):
        raise RequestError(422, "invalid_request", "the body must be a JSON object with `inputs`")
    return document, body[length:]


def _within(announced: str, most: int) -> bool:
    """Python itself refuses to read a number of thousands of digits."""
    return announced.isdecimal() and len(announced) < 20 and int(announced) <= most


def _images(inputs: Any, binary: bytes, limits: Limits) -> RequestImages:
    """RequestError for anything but one input of INPUTS."""
    match inputs:
        case [{"name": "images", "datatype": "UINT8", "shape": [*shape]} as given]:
            images = _tensor(given, shape, binary, limits)
            cost = RESIZING * math.prod(shape[:3]) / 1e6 + EACH * len(images)
            return RequestImages(
                len(images),
                cost,
                lambda preprocess, _: np.stack([preprocess(one) for one in images]),
                sides=[one.shape[:2] for one in images],
            )
        case [{"name": "encoded", "datatype": "BYTES", "shape": [*shape]} as given]:
            files = _files(given, binary, limits)
            if shape != [len(files)]:
                raise _wrong(f"encoded has shape {str(shape)[:40]} and {len(files)} elements")
            return encoded_images(files, numbered(len(files)), limits)
    raise _wrong("`inputs` must be one tensor: `images`, UINT8 [N, height, width, 3], or `encoded`, BYTES [N]")


def _tensor(given: dict[str, Any], shape: list[Any], binary: bytes, limits: Limits) -> np.ndarray:
    if len(shape) != 4 or any(type(side) is not int or side < 1 for side in shape) or shape[3] != 3:
        raise _wrong(f"images has shape {str(shape)[:40]}, not [N, height, width, 3]")
    if shape[0] > limits.max_images:
        raise RequestError(413, "too_many_images", f"{shape[0]} images in one request; at most {limits.max_images}")
    if shape[1] * shape[2] > limits.max_pixels or math.prod(shape[:3]) > limits.max_total_pixels:
        raise RequestError(413, "images_too_large", f"images of {shape[1]} × {shape[2]} pixels are too large")
    size = _binary_size(given, binary)
    if size is not None:
        values = np.frombuffer(binary[:size], np.uint8)
    else:
        try:
            numbers = np.array(given.get("data"))
        except ValueError as err:  # rows of several lengths
            raise _wrong("the data of images are no even array") from err
        if _has_booleans(given.get("data"), numbers):
            raise RequestError(400, "invalid_request", "the data of images have booleans, not whole numbers in 0 … 255")
        if numbers.dtype.kind not in "iu" or (numbers.size and (numbers.min() < 0 or numbers.max() > 255)):
            raise _wrong("the data of images are not whole numbers in 0 … 255")
        values = numbers.ravel().astype(np.uint8)
    if values.size != math.prod(shape):
        raise _wrong(f"images has shape {shape} and {values.size} values")
    return values.reshape(shape)


def _files(given: dict[str, Any], binary: bytes, limits: Limits) -> list[bytes]:
    size = _binary_size(given, binary)
    if size is None:
        texts = given.get("data")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise _wrong("the data of encoded are not strings of base64, at least one")
        _check_count(len(texts), limits)
        try:
            return [from_base64(text) for text in texts]
        except ValueError as err:
            raise RequestError(400, "invalid_base64", "an element of encoded is not valid base64") from err
    files, place, end = [], 0, min(size, len(binary))
    while place + 4 <= end:  # each element after its length
        (length,) = struct.unpack_from("<I", binary, place)
        files.append(binary[place + 4 : place + 4 + length])
        place += 4 + length
        _check_count(len(files), limits)
    if place != end or end != size or not files:
        raise _wrong("the binary data of encoded are not elements, each after its length")
    return files


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_images:
        raise RequestError(413, "too_many_images", f"more than {limits.max_images} images in one request")


def _has_booleans(data: Any, numbers: np.ndarray) -> bool:
    """Whether nested lists of equal lengths, which became `numbers`, hold true or false: NumPy converts them to 1 and 0 among numbers."""
    if numbers.dtype.kind not in "biuf":
        return False
    for _ in range(numbers.ndim - 1):
        data = chain.from_iterable(data)
    return numbers.ndim > 0 and bool in set(map(type, data))


def _binary_size(given: dict[str, Any], binary: bytes) -> int | None:
    """The bytes of the input in `binary`, which holds nothing else; None where its data are in the JSON document."""
    parameters = given.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None and (type(size) is not int or size < 0):
        raise RequestError(400, "invalid_request", "binary_data_size is not a whole number of bytes")
    if len(binary) > (size or 0):
        message = f"{len(binary)} bytes follow the JSON document, and binary_data_size is {size or 0}"
        raise RequestError(400, "invalid_request", message)
    return size


def _wrong(message: str) -> RequestError:
    return RequestError(422, "invalid_request", message)
