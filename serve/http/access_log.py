"""A line for each request, and a name by which it is found again: `X-Request-Id`, the client's own or a new one."""

import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("refract.serve.http.access_log")

_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


MOST = 10_000
"""Lines that wait to be written; what comes meanwhile is lost, and counted in a line of its own."""

LONGEST = 500
"""Characters of a path that are written."""

EACH_S = 0.02
"""Lines are written together, so often."""

TOGETHER = 256
"""Lines of one write, after which it is told how many were lost."""

LAST_S = 2.0
"""For what still waits when the process ends."""


def write_lines(descriptor: int = 1) -> None:
    """Have the lines written to the standard output, each a JSON object and nothing else; warnings go elsewhere."""
    logger.addHandler(AccessLogWriter(descriptor))
    logger.setLevel(logging.INFO)
    logger.propagate = False


class AccessLogWriter(logging.Handler):
    """Writes lines from a thread, and past Python's own buffer: a reader that stalls holds up no request, nor the end."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor, self._broken, self._torn = descriptor, False, False
        self._lost = 0  # for want of a place among those that wait
        self._lines: deque[str] = deque()
        self._some = threading.Event()
        threading.Thread(target=self._write, name="access lines", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._lines) >= MOST:
            self._lost += 1
            return
        self._lines.append(record.getMessage())
        if not self._some.is_set():
            self._some.set()

    def flush(self) -> None:
        """Which Python asks for at its end."""
        ends = time.monotonic() + LAST_S
        while self._some.is_set() and time.monotonic() < ends:
            time.sleep(EACH_S / 4)

    def _write(self) -> None:
        dropped = told = 0  # that could not be written; of all that are lost
        while self._some.wait():
            time.sleep(EACH_S)
            while self._lines:
                count = min(len(self._lines), TOGETHER)
                dropped += self._unwritten("".join(f"{self._lines[i]}\n" for i in range(count)))
                for _ in range(count):
                    self._lines.popleft()
                lost = self._lost + dropped - told
                if lost and not self._unwritten(json.dumps({"time": _now(), "lost": lost}) + "\n"):
                    told += lost
            self._some.clear()
            if self._lines:  # came after the look, and before that
                self._some.set()

    def _unwritten(self, text: str) -> int:
        """Write it; how many of its lines could not be written."""
        whole = rest = (b"\n" if self._torn else b"") + text.encode()
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # a pipe that another process has made so
                time.sleep(EACH_S)
            except OSError as err:  # nobody reads any more, or there is no room
                if not self._broken:
                    logging.getLogger("refract.serve").warning("access lines cannot be written: %s", err.strerror)
                self._broken = True
                self._torn = self._torn if rest is whole else not whole[: -len(rest)].endswith(b"\n")
                return rest.lstrip(b"\n").count(b"\n")
        self._broken = self._torn = False
        return 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _value(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """That of the first of this name, in lower case. Starlette's class decodes each header on its way, for each request."""
    return next((value for own, value in headers if own == name), b"")


class AccessLog:
    """ASGI middleware. log: whether lines are written, as JSON, to the logger `refract.serve.http.access_log`."""

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
                    "time": _now(),
                    "id": name.decode(),
                    "method": scope["method"],
                    "path": scope["path"][:LONGEST],
                    "status": status,
                    "code": state.get("code"),
                    "seconds": round(time.monotonic() - began, 6),
                    "key": state.get("key"),
                    "model": digest.decode() or None,
                }
                logger.info(json.dumps({name: value for name, value in line.items() if value is not None}))
