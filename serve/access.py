"""A line for each request, and a name by which it is found again: `X-Request-Id`, the client's own or a new one."""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("serve.access")

_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def write_lines() -> None:
    """Have the lines written to the standard output, each a JSON object and nothing else; warnings go elsewhere."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _value(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """That of the first of this name, in lower case. Starlette's class decodes each header on its way, for each request."""
    return next((value for own, value in headers if own == name), b"")


class Access:
    """ASGI middleware. log: whether lines are written, as JSON, to the logger `serve.access`."""

    def __init__(self, app: ASGIApp, *, log: bool) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _value(scope["headers"], b"x-request-id")
        name = given if _ID.fullmatch(given) else os.urandom(16).hex().encode()
        began, status, digest = time.monotonic(), 0, b""
        state = scope.setdefault("state", {})

        async def named(message: Message) -> None:
            nonlocal status, digest
            if message["type"] == "http.response.start":
                status = message["status"]
                digest = _value(message["headers"], b"x-model-digest")
                message["headers"] = [*message["headers"], (b"x-request-id", name)]
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            if self._log:
                line = {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "id": name.decode(),
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "code": state.get("code"),
                    "seconds": round(time.monotonic() - began, 6),
                    "key": state.get("key"),
                    "model": digest.decode() or None,
                }
                logger.info(json.dumps({name: value for name, value in line.items() if value is not None}))
