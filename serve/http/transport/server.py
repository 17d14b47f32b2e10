"""Run one ASGI application on one port: bind, report readiness, drain and shut down gracefully."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from refract.serve.http.transport.connection import Connection

logger = logging.getLogger(__name__)

GRACE_S = 20
"""Seconds in which in-flight requests can finish; later ones are dropped and logged. Kubernetes kills the process after 30 s."""

STUCK_S = 5
"""Seconds after GRACE_S when the process exits by force: image decoding cannot be interrupted."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to `host` and `port`; port 0 selects a free one. OSError if the host is unknown or the port is taken.

    The socket does not listen yet, so that connections are refused, instead of waiting, while the model loads.
    """
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    bound = socket.socket(family, kind, proto)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def address(bound: socket.socket) -> str:
    """Return host and port of a bound socket, as a client writes them."""
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def url(bound: socket.socket) -> str:
    """Return the URL of a bound socket, as a client writes it."""
    return f"http://{address(bound)}"


class Server(uvicorn.Server):
    """A uvicorn server on a bound socket that calls `on_ready` when it accepts requests.

    A signal before that exits the process with code 0. At the first signal after it, the server calls `on_leave` and still serves for
    `drain_s` seconds, so that load balancers notice. Then it accepts no more connections, finishes the in-flight requests and stops,
    after drain_s + GRACE_S + STUCK_S seconds at the latest. Meanwhile it runs `on_stop`, which receives GRACE_S. It closes an idle
    connection after `keep_alive_s` seconds.
    `run(sockets=[…])` raises SystemExit if the start-up of the application failed.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        on_ready: Callable[[], None],
        on_leave: Callable[[], None] = lambda: None,
        on_stop: Callable[[float], Awaitable[None]] | None = None,
        drain_s: float = 0,
        keep_alive_s: int = 75,
    ) -> None:
        # `run` receives the sockets, so no port is set. log_config=None keeps the caller's logging configuration.
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                lifespan="on",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # the application never uses the client's address
                timeout_graceful_shutdown=GRACE_S,
                timeout_keep_alive=keep_alive_s,
            )
        )
        self._on_ready, self._on_leave, self._on_stop, self._drain_s = on_ready, on_leave, on_stop, drain_s
        self._leaving = False
        self._draining: threading.Timer | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn logs a failed start as a traceback. The application stores the exception, and the command prints it as one line.
        log = logging.getLogger("uvicorn.error")
        log.disabled = True
        try:
            await super().startup(sockets)
        finally:
            log.disabled = False
        if not self.should_exit:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.ensure_future(self._on_stop(GRACE_S)) if self._on_stop else None
        await super().shutdown(sockets)
        if stopping and not self.force_exit:
            await stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:  # no request is in flight
            os._exit(0)
        if self._draining is not None:  # a second signal ends the drain
            self._draining.cancel()
        wait = 0 if self._leaving else self._drain_s
        self._on_leave()
        if not self._leaving:
            _call_later(wait + GRACE_S + STUCK_S, _exit_by_force)
        self._leaving = True
        if wait:
            logger.info("shutting down; requests are served for another %g s", wait)
            self._draining = _call_later(wait, lambda: self._stop(sig))
        else:
            self._stop(sig)

    def _stop(self, sig: int) -> None:
        """Stop like uvicorn's `handle_exit`, but do not raise the signal again after the shutdown, so that `run` returns."""
        self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
        self.should_exit = True


def _call_later(seconds: float, call: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer


def _exit_by_force() -> None:
    logger.error("some in-flight requests did not finish in time; the server exits without them")
    os._exit(1)
