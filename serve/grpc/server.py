"""Serve the Open Inference Protocol over gRPC, in the event loop of the HTTP server, with the same service, limits, keys and metrics.

Each call is handled as a stream of requests, of which the first is read. On the wire both are equal, and so the server checks the key and
the admission before the message arrives. gRPC receives a message as a whole: the limit on all bodies together is checked after each one.
"""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import grpc

from refract.serve.errors import RequestError
from refract.serve.grpc.calls import RPCS, Call, OpenInference
from refract.serve.grpc.messages import SERVICE
from refract.serve.http.access_log import log_request, request_id_of
from refract.serve.http.auth import ApiKeys
from refract.serve.http.errors import Problem, problem_of
from refract.serve.http.tracing import record_response, server_span
from refract.serve.http.transport.server import address
from refract.serve.requests.body import Bodies
from refract.serve.runtime.service import Service

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

STATUS: Mapping[int, grpc.StatusCode] = MappingProxyType(
    {
        200: grpc.StatusCode.OK,
        400: grpc.StatusCode.INVALID_ARGUMENT,
        401: grpc.StatusCode.UNAUTHENTICATED,
        404: grpc.StatusCode.NOT_FOUND,
        408: grpc.StatusCode.DEADLINE_EXCEEDED,
        413: grpc.StatusCode.INVALID_ARGUMENT,
        422: grpc.StatusCode.INVALID_ARGUMENT,
        429: grpc.StatusCode.RESOURCE_EXHAUSTED,
        500: grpc.StatusCode.INTERNAL,
        503: grpc.StatusCode.UNAVAILABLE,
        504: grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
"""The status code of gRPC for each HTTP status of the same problem."""

CALLS_PER_SLOT = 2
"""Most calls at a time, as a multiple of the admission slots: also those that are about to be rejected, and those of the metadata."""

LOST_S = 1.0
"""Seconds of a shutdown after which gRPC may end it once no call is in flight. It sometimes loses a call that arrives as the shutdown
begins: neither client nor server would end it before the grace period does. The responses in transmission need less time."""

IDENTITY_ONLY = 1
"""Accept uncompressed messages only: gRPC would decompress a small message to any size before its limit is checked."""


class GrpcServer:
    """A server on one port, between `start` and `stop`. bound: a bound socket; its address is taken over when the server starts.

    keys: API keys of the clients, None for none; access_log: log one line for each call; traces: receives the spans.
    """

    def __init__(
        self,
        bound: socket.socket,
        service: Service,
        bodies: Bodies,
        *,
        keys: ApiKeys | None,
        access_log: bool,
        traces: "TracerProvider | None",
    ) -> None:
        self._bound, self._service, self._log = bound, service, access_log
        self._protocol = OpenInference(service, bodies, keys)
        self._tracer = traces.get_tracer("refract.serve") if traces else None
        self._server: grpc.aio.Server | None = None
        self._in_flight = 0

    async def start(self) -> None:
        """Accept calls. RuntimeError if another process took the port."""
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # else a second server would share the port, and take some of the calls
                ("grpc.max_receive_message_length", self._service.limits.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.compression_enabled_algorithms_bitset", IDENTITY_ONLY),
            ],
            maximum_concurrent_rpcs=CALLS_PER_SLOT * self._service.admission.max_requests,
        )
        handlers = {name: grpc.stream_unary_rpc_method_handler(partial(self._answer, name)) for name in RPCS}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = address(self._bound)
        self._bound.close()
        self._server.add_insecure_port(port)
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Accept no more calls, and cancel those that do not finish within `grace_s` seconds. It may be called again."""
        if not self._server:
            return
        stopping = asyncio.ensure_future(self._server.stop(grace_s))
        while not stopping.done():
            await asyncio.wait({stopping}, timeout=LOST_S)
            if not self._in_flight and not stopping.done():
                await self._server.stop(None)
        await stopping

    async def _answer(self, name: str, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        self._in_flight += 1
        try:
            return await self._answered(name, messages, context)
        finally:
            self._in_flight -= 1

    async def _answered(self, name: str, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        headers = {key: value for key, value in reversed(context.invocation_metadata()) if isinstance(value, str)}
        call = Call(headers, request_id_of(headers.get("x-request-id", "").encode()).decode(), messages)
        start, response, problem = time.monotonic(), b"", None
        with self._span(name, headers) as span:
            try:
                response = (await RPCS[name](self._protocol, call)).SerializeToString()
            except asyncio.CancelledError:
                problem = problem_of(RequestError(400, "client_disconnected", "the client ended the call"))
                raise
            except Exception as err:
                problem = problem_of(err)
                if problem.status == 500:
                    logger.exception("a call failed")
            finally:
                self._record(name, call, problem, time.monotonic() - start, span)
        trailing = _trailing(call, problem)
        if problem:
            await context.abort(STATUS[problem.status], problem.detail, trailing)
        context.set_trailing_metadata(trailing)
        return response

    def _span(self, name: str, headers: Mapping[str, str]) -> "AbstractContextManager[Span | None]":
        if self._tracer is None:
            return nullcontext()
        attributes = {"rpc.system": "grpc", "rpc.service": SERVICE, "rpc.method": name}
        return server_span(self._tracer, f"{SERVICE}/{name}", headers, attributes)

    def _record(self, name: str, call: Call, problem: Problem | None, seconds: float, span: "Span | None") -> None:
        """Count a rejected request; record the response in the span and in the access log."""
        status, code = (problem.status, problem.code) if problem else (200, None)
        if problem and name == "ModelInfer":
            self._service.metrics.refused(problem.code)
        if span and self._tracer:
            span.set_attribute("rpc.grpc.status_code", STATUS[status].value[0])
            record_response(self._tracer, span, status, call.request_id, call.timing)
        if self._log:
            log_request(
                id=call.request_id,
                method="gRPC",
                path=f"/{SERVICE}/{name}",
                status=status,
                code=code,
                seconds=seconds,
                key=call.key,
                model=call.digest,
            )


def _trailing(call: Call, problem: Problem | None) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata: the header fields that the HTTP response has, and the code of the problem."""
    fields = {"x-request-id": call.request_id, "x-model-digest": call.digest, "server-timing": call.timing}
    if problem:
        fields["refract-code"] = problem.code
        fields["retry-after"] = (problem.headers or {}).get("Retry-After")
    return tuple((name, value) for name, value in fields.items() if value)
