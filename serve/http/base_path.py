"""Run the server below a path of a reverse proxy."""

import re

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)+")

SERVER_PATHS = ("admin", "docs", "livez", "openapi.json", "readyz", "redoc", "static-offline-docs", "v1", "v2")
"""The first segments of the server's own paths."""


def prefix_problem(prefix: str) -> str | None:
    """Return why the server cannot run below `prefix`; None if it can."""
    if not _PREFIX.fullmatch(prefix) or {".", ".."} & set(prefix.split("/")):
        return f"{prefix!r} is not a path such as /models, without a slash at its end"
    if prefix.split("/")[1] in SERVER_PATHS:
        return f"{prefix!r} starts like a path of the server itself; use another path"
    return None


class BasePath:
    """ASGI middleware that serves the application below `prefix`, whether the proxy keeps the prefix or removes it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "*":
            await self._app(scope, receive, send)
        elif scope["path"] == self._prefix:  # the web page uses relative URLs, which need the slash
            await RedirectResponse(self._prefix + "/", 308)(scope, receive, send)
        else:
            has_prefix = scope["path"].startswith(self._prefix + "/")
            path = scope["path"] if has_prefix else self._prefix + scope["path"]
            await self._app({**scope, "path": path, "root_path": self._prefix}, receive, send)


def route_path(scope: Scope) -> str:
    """Return the path in `scope` without the prefix, as the application's routes define it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
