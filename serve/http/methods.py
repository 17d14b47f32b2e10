"""HEAD and OPTIONS for every route, and the methods that a path has (RFC 9110, 9.3 and 10.2.1)."""

from collections.abc import Callable, Sequence

from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

EVERY_PATH = "*"
"""The target of an OPTIONS request that asks about the server, not about a resource."""


def allowed(routes: Sequence[BaseRoute], scope: Scope) -> list[str]:
    """The methods of the path in `scope`, in order; none where nothing is there. HEAD goes with GET, OPTIONS with every other."""
    own = routes if scope["path"] == EVERY_PATH else [one for one in routes if one.matches(scope)[0] is not Match.NONE]
    methods = {method for route in own for method in getattr(route, "methods", None) or ["GET"]}
    if "GET" in methods:
        methods.add("HEAD")
    return sorted(methods | {"OPTIONS"}) if methods else []


class Methods:
    """ASGI middleware: answers HEAD as GET, without the body, and OPTIONS with the methods of the path. routes: those of `app`."""

    def __init__(self, app: ASGIApp, routes: Callable[[], Sequence[BaseRoute]]) -> None:
        self._app, self._routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, _without_body(send))
        elif scope["type"] == "http" and scope["method"] == "OPTIONS" and (own := allowed(self._routes(), scope)):
            await Response(status_code=204, headers={"Allow": ", ".join(own)})(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _without_body(send: Send) -> Send:
    async def bodiless(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return bodiless
