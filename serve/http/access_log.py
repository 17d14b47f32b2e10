"""The access log, one JSON line for each request, and `X-Request-Id`, which identifies the request: the client's value or a new one. Routes
find it as `request.state.request_id`."""

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

MAX_WAITING = 10_000
"""Most lines that wait to be written. Further lines are lost; a separate line reports their number."""

MAX_PATH_CHARS = 500
"""Longest part of a path that a line contains, in characters."""

WRITE_INTERVAL_S = 0.02
"""Seconds between two writes."""

LINES_PER_WRITE = 256
"""Most lines of one write. After each write the number of lost lines is reported."""

FLUSH_TIMEOUT_S = 2.0
"""Longest wait for the remaining lines when the process ends, in seconds."""


def write_lines(descriptor: int = 1) -> None:
    """Write the access log to the file descriptor (1: standard output), which then holds JSON lines only; warnings do not go there."""
    logger.addHandler(AccessLogWriter(descriptor))
    logger.setLevel(logging.INFO)
    logger.propagate = False


class AccessLogWriter(logging.Handler):
    """A logging handler that writes lines from a thread and bypasses Python's buffers. A stalled reader of the log therefore delays neither
    a request nor the shutdown."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor, self._broken, self._torn = descriptor, False, False
        self._lost = 0  # lines dropped because MAX_WAITING lines waited
        self._lines: deque[str] = deque()
        self._pending = threading.Event()
        threading.Thread(target=self._write, name="access lines", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._lines) >= MAX_WAITING:
            self._lost += 1
            return
        self._lines.append(record.getMessage())
        if not self._pending.is_set():
            self._pending.set()

    def flush(self) -> None:
        """Wait until the waiting lines are written, at most FLUSH_TIMEOUT_S. `logging` calls it when the process ends."""
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while self._pending.is_set() and time.monotonic() < deadline:
            time.sleep(WRITE_INTERVAL_S / 4)

    def _write(self) -> None:
        unwritten = reported = 0  # lines that `os.write` refused; lost lines that the log already reports
        while self._pending.wait():
            time.sleep(WRITE_INTERVAL_S)
            while self._lines:
                count = min(len(self._lines), LINES_PER_WRITE)
                unwritten += self._write_text("".join(f"{self._lines[i]}\n" for i in range(count)))
                for _ in range(count):
                    self._lines.popleft()
                lost = self._lost + unwritten - reported
                if lost and not self._write_text(json.dumps({"time": _now(), "lost": lost}) + "\n"):
                    reported += lost
            self._pending.clear()
            if self._lines:  # a line that arrived between the last check and `clear`
                self._pending.set()

    def _write_text(self, text: str) -> int:
        """Write `text`. Returns the number of its lines that could not be written."""
        whole = rest = (b"\n" if self._torn else b"") + text.encode()
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another process made the pipe non-blocking
                time.sleep(WRITE_INTERVAL_S)
            except OSError as err:  # the reader closed the pipe, or the disk is full
                if not self._broken:
                    logging.getLogger("refract.serve").warning("the access log cannot be written: %s", err.strerror)
                self._broken = True
                self._torn = self._torn if rest is whole else not whole[: -len(rest)].endswith(b"\n")
                return rest.lstrip(b"\n").count(b"\n")
        self._broken = self._torn = False
        return 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _value(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """Return the value of the first header field `name`, in lower case; b"" without one. Starlette's `Headers` would decode every field of
    every request."""
    return next((value for field, value in headers if field == name), b"")


def request_id_of(client_id: bytes) -> bytes:
    """Return the id of a request: the client's if it is valid, else a new one."""
    return client_id if _ID.fullmatch(client_id) else os.urandom(16).hex().encode()


def log_request(
    *,
    id: str,
    method: str,
    path: str,
    status: int,
    code: str | None,
    seconds: float,
    key: str | None,
    model: str | None,
) -> None:
    """Log the line of one request. Values that are None are omitted. code: that of its problem; key: the name of its API key; model: the
    beginning of the digest of the model that answered."""
    line = {
        "time": _now(),
        "id": id,
        "method": method,
        "path": path,
        "status": status,
        "code": code,
        "seconds": round(seconds, 6),
        "key": key,
        "model": model,
    }
    logger.info(json.dumps({name: value for name, value in line.items() if value is not None}))


class AccessLog:
    """ASGI middleware that adds `X-Request-Id`. log: whether it also logs a JSON line to the logger `refract.serve.http.access_log`."""

    def __init__(self, app: ASGIApp, *, log: bool) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(_value(scope["headers"], b"x-request-id"))
        start, status, digest = time.monotonic(), 0, b""
        state = scope.setdefault("state", {})
        state["request_id"] = request_id.decode()

        async def send_identified(message: Message) -> None:
            nonlocal status, digest
            if message["type"] == "http.response.start":
                status = message["status"]
                digest = _value(message["headers"], b"x-model-digest")
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_identified)
        finally:
            if self._log:
                log_request(
                    id=state["request_id"],
                    method=scope["method"],
                    path=scope["path"][:MAX_PATH_CHARS],
                    status=status,
                    code=state.get("code"),
                    seconds=time.monotonic() - start,
                    key=state.get("key"),
                    model=digest.decode() or None,
                )
