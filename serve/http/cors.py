"""Pages of other origins that may read answers (the Fetch Standard's CORS protocol). Knows nothing of what is asked."""

import re
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANY = "*"

ASKED = "Authorization, Content-Encoding, Content-Type, Inference-Header-Content-Length, Traceparent, X-API-Key, X-Request-Id"
"""Header fields that a page may send."""

ANSWERED = "Retry-After, Server-Timing, X-Model-Digest, X-Request-Id"
"""Header fields of a response that a page may read, in addition to those that are always readable."""

MAX_AGE_S = 600
"""For a browser to remember a preflight."""

_ORIGIN = re.compile(r"https?://[a-z0-9._\[\]:-]+|[a-z][a-z0-9+.-]*-extension://[a-z0-9-]+")


def is_origin(text: str) -> bool:
    """Whether a browser may send it as its Origin: scheme, host and port in lower case, no path; or `*`, which stands for every origin."""
    return text == ANY or _ORIGIN.fullmatch(text) is not None


class Cors:
    """ASGI middleware: adds the header fields by which a browser lets a page of one of `origins` read an answer, a refusal too.

    A preflight is an OPTIONS request, which needs no key; the application answers it with the methods of the path. Keys are sent as header
    fields, so that no credentials of a browser, such as cookies, are ever allowed.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app, self._origins = app, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope)

        async def shared(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": list(message["headers"])}
                self._add(MutableHeaders(scope=message), asked, scope["method"])
            await send(message)

        await self._app(scope, receive, shared)

    def _add(self, answer: MutableHeaders, asked: Headers, method: str) -> None:
        preflight = method == "OPTIONS" and "access-control-request-method" in asked
        if ANY not in self._origins:  # else a cache would give one origin's answer to another
            answer.add_vary_header("Origin")
        origin = asked.get("origin")
        if origin is None or not self._origins & {ANY, origin}:
            return
        answer["Access-Control-Allow-Origin"] = ANY if ANY in self._origins else origin
        if preflight:
            answer["Access-Control-Allow-Methods"] = answer.get("Allow", "")
            answer["Access-Control-Allow-Headers"] = ASKED
            answer["Access-Control-Max-Age"] = str(MAX_AGE_S)
        else:
            answer["Access-Control-Expose-Headers"] = ANSWERED
