"""HEAD and OPTIONS for every route, and the methods that a path allows (RFC 9110, 9.3 and 10.2.1)."""

from collections.abc import Callable, Sequence

from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

EVERY_PATH = "*"
"""The target of an OPTIONS request that concerns the whole server, not one resource."""


def allowed(routes: Sequence[BaseRoute], scope: Scope) -> list[str]:
    """Return the methods of the path in `scope`, sorted; an empty list for an unknown path. GET implies HEAD; every method implies
    OPTIONS."""
    every_path = scope["path"] == EVERY_PATH
    matches = [route for route in routes if every_path or route.matches(scope)[0] is not Match.NONE]
    methods = {method for route in matches for method in getattr(route, "methods", None) or ["GET"]}
    if "GET" in methods:
        methods.add("HEAD")
    return sorted(methods | {"OPTIONS"}) if methods else []


class Methods:
    """ASGI middleware that answers HEAD like GET without the body, and OPTIONS with the methods of the path. routes: returns those of
    `app`."""

    def __init__(self, app: ASGIApp, routes: Callable[[], Sequence[BaseRoute]]) -> None:
        self._app, self._routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, _without_body(send))
        elif scope["type"] == "http" and scope["method"] == "OPTIONS" and (methods := allowed(self._routes(), scope)):
            await Response(status_code=204, headers={"Allow": ", ".join(methods)})(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _without_body(send: Send) -> Send:
    async def send_without_body(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_without_body
