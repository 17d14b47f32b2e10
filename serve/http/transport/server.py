"""One application on one port: binding, the moment of readiness, and a graceful end. Knows nothing of models."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from refract.serve.http.transport.connection import Connection

logger = logging.getLogger(__name__)

# Kubernetes kills after 30 s: what is in flight has this long to finish, then is dropped by us and logged.
GRACE_S = 20
STUCK_S = 5
"""Later than that it is ended by force: an image in a decoder cannot be interrupted."""


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port`, 0 for a free one. OSError if the name is unknown or the port taken.

    It does not accept yet, so that clients are refused, not left waiting, while the model loads.
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


def url(bound: socket.socket) -> str:
    """The address of a bound socket as a client writes it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, on a socket that is bound already, calling `on_ready` once it accepts requests.

    A signal before that ends the process, with code 0. At the first one later it calls `on_leave`, goes on answering for `drain_s` seconds,
    in which a balancer notices, then takes no more connections and ends when what is in flight is answered, after
    drain_s + GRACE_S + STUCK_S at the latest. A connection on which nothing is asked is kept for `keep_alive_s` seconds.
    `run(sockets=[…])` raises SystemExit if the application's start-up failed.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        on_ready: Callable[[], None],
        on_leave: Callable[[], None] = lambda: None,
        drain_s: float = 0,
        keep_alive_s: int = 75,
    ) -> None:
        # The port belongs to the sockets given to `run`; log_config=None leaves logging to whoever configured it.
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                lifespan="on",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nobody here asks who the client is
                timeout_graceful_shutdown=GRACE_S,
                timeout_keep_alive=keep_alive_s,
            )
        )
        self._on_ready, self._on_leave, self._drain = on_ready, on_leave, drain_s
        self._leaving = False
        self._draining: threading.Timer | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn logs a failed start as a traceback; the application keeps the error, and its owner says it in a line.
        log = logging.getLogger("uvicorn.error")
        log.disabled = True
        try:
            await super().startup(sockets)
        finally:
            log.disabled = False
        if not self.should_exit:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:  # nothing is in flight
            os._exit(0)
        if self._draining is not None:  # a second signal ends the drain
            self._draining.cancel()
        wait = 0 if self._leaving else self._drain
        self._on_leave()
        if not self._leaving:
            _later(wait + GRACE_S + STUCK_S, _end_by_force)
        self._leaving = True
        if wait:
            logger.info("asked to end; it answers for %g s more", wait)
            self._draining = _later(wait, lambda: self._stop(sig))
        else:
            self._stop(sig)

    def _stop(self, sig: int) -> None:
        """As uvicorn, which would raise the signal again when all is done; `run` returns instead."""
        self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
        self.should_exit = True


def _later(seconds: float, call: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer


def _end_by_force() -> None:
    logger.error("not everything in flight has ended; the server ends without it")
    os._exit(1)
