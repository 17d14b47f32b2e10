"""Run the application of a review on one port, until SIGINT or SIGTERM."""

import getpass
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from refract import output, progress
from refract.api_keys import KeyFile
from refract.errors import InputError
from refract.pipeline.review.access import check_keys
from refract.pipeline.review.app import create_app
from refract.pipeline.review.session import ReviewSession

GRACE_S = 5
"""Seconds in which running requests can finish after a signal."""


def serve_review(
    start: Callable[[], tuple[ReviewSession, str]], *, host: str, port: int, keys: Path | None = None
) -> int:
    """Serve a review until a stop signal, and return the exit code 0.

    start: returns the session and the address of its label history; it runs once the port is known to be free, as it may take minutes.
    InputError for a taken port, an invalid file of keys, and a host that other machines reach without keys.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: expected 0 to 65535")
    key_file = None if keys is None else _key_file(keys)
    check_keys(host, key_file)
    try:
        bound = listen(host, port)
    except OSError as err:
        raise InputError(f"cannot listen on {host}:{port}: {err.strerror}; choose another --host or --port") from err
    with bound:
        session, address = start()
        app = create_app(session, host=host, keys=key_file, reviewer=_user())
        ReviewServer(app, on_ready=lambda: _announce(session, address, url(bound))).run(sockets=[bound])
    return 0


def _announce(session: ReviewSession, address: str, page: str) -> None:
    progress.finish()
    print(
        f"Review of {session.title}: open {page}; decisions are recorded in {address}; Ctrl+C stops the review",
        flush=True,
    )
    output.result({"title": session.title, "url": page, "labels": address})


def _key_file(file: Path) -> KeyFile:
    try:
        return KeyFile(file)
    except OSError as err:
        raise InputError(f"--keys: {file}: {err.strerror}") from err
    except ValueError as err:
        raise InputError(f"--keys: {err}") from err


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on `host` and `port`; port 0 selects a free one. OSError if the host is unknown or the port is taken.

    Connections wait until the server runs. Without `listen`, a second review could bind the same port and fail only once it is ranked.
    """
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    bound = socket.socket(family, kind, proto)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()
    except OSError:
        bound.close()
        raise
    return bound


def url(bound: socket.socket) -> str:
    """Return the URL of a bound socket, as a browser opens it."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class ReviewServer(uvicorn.Server):
    """A uvicorn server that calls `on_ready` when it accepts requests. `run(sockets=[…])` returns after a signal."""

    def __init__(self, app: ASGIApp, *, on_ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, but do not raise the signal again after the shutdown as uvicorn does, so that `run` returns."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
