"""Traces for OpenTelemetry: a span for each request, below the caller's own where it sends `traceparent`, and in it one for each stage."""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_STAGE = re.compile(r"(\w+);dur=([\d.]+)")


def provider(address: str) -> "TracerProvider":
    """Of spans that go to a collector at `address`, as http://localhost:4318/v1/traces, in batches, from a thread of their own; where it
    does not answer they are dropped. ModuleNotFoundError without the extra `tracing`."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # Of a collector that is not there it says three lines at each try.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    made = TracerProvider(resource=Resource.create({"service.name": "refract"}), shutdown_on_exit=False)
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
    return made


class Traced:
    """ASGI middleware. The stages are those that an answer tells in `Server-Timing`, the last of which ends with it."""

    def __init__(self, app: ASGIApp, *, provider: "TracerProvider", busy: Collection[str]) -> None:
        """busy: the paths by which spans are named; those of other paths by their method alone."""
        self._app, self._busy, self._tracer = app, busy, provider.get_tracer("refract.serve")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(Headers(scope=scope))
        facts = {"http.request.method": scope["method"], "url.path": scope["path"]}
        # A name for each path that strangers think of would be too many.
        name = f"{scope['method']} {scope['path']}" if scope["path"] in self._busy else scope["method"]
        with self._tracer.start_as_current_span(name, parent, SpanKind.SERVER, facts) as span:

            async def told(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = Headers(raw=message["headers"])
                    span.set_attribute("http.response.status_code", message["status"])
                    span.set_attribute("refract.request_id", headers.get("x-request-id", ""))
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                    self._stages(headers.get("server-timing", ""))
                await send(message)

            await self._app(scope, receive, told)

    def _stages(self, timing: str) -> None:
        stages = [(name, int(float(milliseconds) * 1e6)) for name, milliseconds in _STAGE.findall(timing)]
        began = time.time_ns() - sum(length for _, length in stages)
        for name, length in stages:
            self._tracer.start_span(name, start_time=began).end(began + length)
            began += length


async def close(traces: "TracerProvider") -> None:
    """Send what is left, for two seconds at most."""
    thread = threading.Thread(target=traces.shutdown, daemon=True)
    thread.start()
    await asyncio.to_thread(thread.join, 2)
