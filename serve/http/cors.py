"""Let web pages of other origins read responses (the CORS protocol of the Fetch Standard)."""

import re
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANY = "*"

REQUEST_HEADERS = "Authorization, Content-Encoding, Content-Type, Inference-Header-Content-Length, Traceparent, X-API-Key, X-Request-Id"
"""Header fields that a page may send."""

RESPONSE_HEADERS = "Retry-After, Server-Timing, X-Model-Digest, X-Request-Id"
"""Header fields of a response that a page may read in addition to those that are always readable."""

MAX_AGE_S = 600
"""Seconds for which a browser may cache a preflight response."""

_ORIGIN = re.compile(r"https?://[a-z0-9._\[\]:-]+|[a-z][a-z0-9+.-]*-extension://[a-z0-9-]+")


def is_origin(text: str) -> bool:
    """Whether a browser may send `text` as Origin: scheme, host and port in lower case, without a path. `*` stands for every origin."""
    return text == ANY or _ORIGIN.fullmatch(text) is not None


class Cors:
    """ASGI middleware that adds the CORS header fields, so that pages of `origins` can read responses, including errors.

    A preflight is an OPTIONS request and needs no API key; the application answers it with the methods of the path. API keys are sent as
    header fields, so the credentials of a browser, such as cookies, are never allowed.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app, self._origins = app, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_headers = Headers(scope=scope)

        async def send_shared(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": list(message["headers"])}
                self._add(MutableHeaders(scope=message), request_headers, scope["method"])
            await send(message)

        await self._app(scope, receive, send_shared)

    def _add(self, response: MutableHeaders, request: Headers, method: str) -> None:
        """Add the CORS header fields to those of the response."""
        preflight = method == "OPTIONS" and "access-control-request-method" in request
        if ANY not in self._origins:  # without it a cache would return one origin's response to another
            response.add_vary_header("Origin")
        origin = request.get("origin")
        if origin is None or not self._origins & {ANY, origin}:
            return
        response["Access-Control-Allow-Origin"] = ANY if ANY in self._origins else origin
        if preflight:
            response["Access-Control-Allow-Methods"] = response.get("Allow", "")
            response["Access-Control-Allow-Headers"] = REQUEST_HEADERS
            response["Access-Control-Max-Age"] = str(MAX_AGE_S)
        else:
            response["Access-Control-Expose-Headers"] = RESPONSE_HEADERS
