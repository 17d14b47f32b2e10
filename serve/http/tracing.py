"""OpenTelemetry traces: a span for each request with a child span for each stage. Its parent is the client's span, from `traceparent`."""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_STAGE = re.compile(r"(\w+);dur=([\d.]+)")


def provider(address: str) -> "TracerProvider":
    """Return a provider that sends spans in batches, from its own thread, to the collector at `address`, such as
    http://localhost:4318/v1/traces. Spans are dropped while the collector is unreachable. Raises ModuleNotFoundError without the extra
    `tracing`."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # The exporter logs three lines at each attempt to reach a collector that is down.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    traces = TracerProvider(resource=Resource.create({"service.name": "refract"}), shutdown_on_exit=False)
    traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
    return traces


class Tracing:
    """ASGI middleware that records a span for each request. The stages come from the response's `Server-Timing`; the last one ends with the
    response."""

    def __init__(self, app: ASGIApp, *, provider: "TracerProvider", named_paths: Collection[str]) -> None:
        """named_paths: paths that appear in the name of their spans; spans of other paths are named by the method only."""
        self._app, self._named_paths, self._tracer = app, named_paths, provider.get_tracer("refract.serve")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        # Clients choose the path freely, so a name for each would be unbounded.
        name = f"{scope['method']} {scope['path']}" if scope["path"] in self._named_paths else scope["method"]
        with server_span(self._tracer, name, Headers(scope=scope), attributes) as span:

            async def send_recorded(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = Headers(raw=message["headers"])
                    span.set_attribute("http.response.status_code", message["status"])
                    request_id, timing = headers.get("x-request-id", ""), headers.get("server-timing", "")
                    record_response(self._tracer, span, message["status"], request_id, timing)
                await send(message)

            await self._app(scope, receive, send_recorded)


def server_span(
    tracer: "Tracer", name: str, headers: Mapping[str, str], attributes: Mapping[str, str]
) -> AbstractContextManager["Span"]:
    """Record a span of the server until the block ends. headers: those of the request, of which `traceparent` names the client's span."""
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract(headers)
    return tracer.start_as_current_span(name, parent, SpanKind.SERVER, attributes)


def record_response(tracer: "Tracer", span: "Span", status: int, request_id: str, timing: str) -> None:
    """Record the response in the current `span`: an error from the HTTP status 500 on, and a span for each stage of a `Server-Timing`
    header; their durations there are in milliseconds."""
    from opentelemetry.trace import StatusCode

    span.set_attribute("refract.request_id", request_id)
    if status >= 500:
        span.set_status(StatusCode.ERROR)
    stages = [(name, int(float(milliseconds) * 1e6)) for name, milliseconds in _STAGE.findall(timing)]
    start = time.time_ns() - sum(nanoseconds for _, nanoseconds in stages)
    for name, nanoseconds in stages:
        tracer.start_span(name, start_time=start).end(start + nanoseconds)
        start += nanoseconds


async def shut_down(traces: "TracerProvider") -> None:
    """Send the remaining spans, for at most two seconds."""
    thread = threading.Thread(target=traces.shutdown, daemon=True)
    thread.start()
    await asyncio.to_thread(thread.join, 2)
