"""The calls of the Open Inference Protocol over gRPC: what each checks, reads and returns. `refract.serve.grpc.server` transports them."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import numpy as np

from refract.serve.errors import NotReadyError, RequestError
from refract.serve.grpc.messages import MESSAGES
from refract.serve.grpc.parsing import parsed
from refract.serve.http.auth import ApiKeys
from refract.serve.requests.body import Bodies
from refract.serve.requests.model_name import check_model
from refract.serve.requests.protocols import InferMessage
from refract.serve.runtime.open_inference import (
    PLATFORM,
    Tensor,
    TensorMetadata,
    inputs_of,
    outputs_of,
    record,
    tensors_of,
)
from refract.serve.runtime.service import Service
from refract.serve.runtime.work import Work

MOST_BYTES = 64 * 1024
"""Longest message that is parsed on the event loop, in bytes: one with the name of a model."""


@dataclass
class Call:
    """A call in progress. headers: its metadata that are texts; messages: those of the client, as bytes. The answer sets the others.

    key: the name of its API key; digest: the beginning of the digest of the model that answered; timing: a `Server-Timing` value.
    """

    headers: Mapping[str, str]
    request_id: str
    messages: AsyncIterator[bytes]
    key: str | None = None
    digest: str | None = None
    timing: str = ""


class OpenInference:
    """Answers calls with the messages of `MESSAGES`. The errors are those of the HTTP routes. Use it on the service's event loop only."""

    def __init__(self, service: Service, bodies: Bodies, keys: ApiKeys | None) -> None:
        self._service, self._bodies = service, bodies
        self._rated, self._unrated = keys, keys.unrated() if keys else None

    async def server_live(self, call: Call) -> Any:
        """Whether the self-test has not failed twice in a row."""
        return MESSAGES["ServerLiveResponse"](live=_passes(self._service.models.check_alive))

    async def server_ready(self, call: Call) -> Any:
        """Whether the model passes its self-test, and the server is not shutting down."""
        return MESSAGES["ServerReadyResponse"](ready=self._service.accepting)

    async def server_metadata(self, call: Call) -> Any:
        """Name and version of the server. It has no extensions over gRPC: raw contents belong to the protocol."""
        return MESSAGES["ServerMetadataResponse"](name="refract", version=version("refract"))

    async def model_ready(self, call: Call) -> Any:
        """Whether the named model is ready. RequestError 401, or 404 for another model."""
        _check_key(self._unrated, call)
        self._check_model("ModelReadyRequest", await self._receive(call))
        return MESSAGES["ModelReadyResponse"](ready=self._service.accepting)

    async def model_metadata(self, call: Call) -> Any:
        """Inputs and outputs of the named model. RequestError 401, or 404 for another model."""
        _check_key(self._unrated, call)
        self._check_model("ModelMetadataRequest", await self._receive(call))
        engine = self._service.models.engine
        bundle = engine.bundle
        tensor, response = MESSAGES["ModelMetadataResponse.TensorMetadata"], MESSAGES["ModelMetadataResponse"]
        inputs, outputs = (
            [tensor(**row._asdict()) for row in rows] for rows in (inputs_of(engine), outputs_of(engine))
        )
        names = {"name": bundle.info.name, "versions": [bundle.digest[:16]], "platform": PLATFORM}
        return response(**names, inputs=inputs, outputs=outputs)

    async def model_infer(self, call: Call) -> Any:
        """Classify tensors or encoded images. RequestError, OverloadedError, NotReadyError, ClosedError or BatchError."""
        start = time.monotonic()
        _check_key(self._rated, call)
        with self._service.admitted():
            content = await self._receive(call)
            with self._bodies.holding(content):
                # The body names the model, so the parser checks it.
                message = InferMessage(content, self._service.models.engine.bundle)
                results = await self._service.predict(Work(message, request_id=call.request_id))
        tensors, info = tensors_of(results), results.bundle.info
        call.digest, call.timing = results.bundle.digest[:16], results.timing
        tensor = MESSAGES["ModelInferResponse.InferOutputTensor"]
        response = MESSAGES["ModelInferResponse"](
            model_name=info.name,
            model_version=call.digest,
            id=results.request.id or "",
            outputs=[tensor(**TensorMetadata(*row[:3])._asdict()) for row in tensors],
            raw_output_contents=list(map(_raw, tensors)),
        )
        record(self._service, call.request_id, results, time.monotonic() - start)
        return response

    async def _receive(self, call: Call) -> bytes:
        """Return the first message. RequestError 408 if it does not arrive in time, 400 if the client ends the call without one."""
        seconds = self._service.limits.body_seconds
        try:
            async with asyncio.timeout(seconds):
                return await anext(call.messages)
        except TimeoutError as err:
            raise RequestError(408, "body_too_slow", f"the whole message did not arrive within {seconds:g} s") from err
        except StopAsyncIteration as err:
            raise RequestError(400, "client_disconnected", "the client ended the call before its message") from err

    def _check_model(self, name: str, content: bytes) -> None:
        """Check the model that the message `name` names. RequestError 404 for another model, 413 for a message that is no such one."""
        if len(content) > MOST_BYTES:
            raise RequestError(413, "body_too_large", f"the message is larger than {MOST_BYTES} bytes")
        model = parsed(name, content)
        check_model(self._service.models.engine.bundle, model.name, model.version or None)


RPCS: Mapping[str, Callable[[OpenInference, Call], Awaitable[Any]]] = MappingProxyType(
    {
        "ServerLive": OpenInference.server_live,
        "ServerReady": OpenInference.server_ready,
        "ServerMetadata": OpenInference.server_metadata,
        "ModelReady": OpenInference.model_ready,
        "ModelMetadata": OpenInference.model_metadata,
        "ModelInfer": OpenInference.model_infer,
    }
)
"""The calls by their names in the protocol."""


def _check_key(keys: ApiKeys | None, call: Call) -> None:
    if keys:
        key = keys.find(call.headers.get("authorization", ""), call.headers.get("x-api-key", ""))
        call.key = key.name
        keys.take_token(key)


def _passes(check: Callable[[], None]) -> bool:
    try:
        check()
    except NotReadyError:
        return False
    return True


def _raw(tensor: Tensor) -> bytes:
    """Return an output as raw contents: little-endian numbers, or each text after its length as 4 bytes."""
    if isinstance(tensor.values, np.ndarray):
        return np.ascontiguousarray(tensor.values, "<f4").tobytes()
    texts = [text.encode() for text in tensor.values]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)
