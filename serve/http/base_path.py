"""The server below a path of a reverse proxy. Knows nothing of what is asked."""

import re

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)+")

OWN = ("admin", "docs", "livez", "openapi.json", "readyz", "redoc", "static-offline-docs", "v1", "v2")
"""What the server's own paths begin with."""


def prefix_problem(prefix: str) -> str | None:
    """Why the server cannot be below `prefix`; None where it can."""
    if not _PREFIX.fullmatch(prefix) or {".", ".."} & set(prefix.split("/")):
        return f"{prefix!r} is not a path as /models, without a slash at its end"
    if prefix.split("/")[1] in OWN:
        return f"{prefix!r} begins as paths of the server itself do; take another"
    return None


class BasePath:
    """ASGI middleware: answers below `prefix` what the application answers at `/`, whether the proxy keeps the prefix or removes it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "*":
            await self._app(scope, receive, send)
        elif scope["path"] == self._prefix:  # the page asks relative to its own folder
            await RedirectResponse(self._prefix + "/", 308)(scope, receive, send)
        else:
            kept = scope["path"].startswith(self._prefix + "/")
            whole = scope["path"] if kept else self._prefix + scope["path"]
            await self._app({**scope, "path": whole, "root_path": self._prefix}, receive, send)


def route_path(scope: Scope) -> str:
    """The path in `scope` as the application has it, without the prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
