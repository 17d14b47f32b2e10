"""Read request bodies within the memory limits of one request and of all requests together."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from refract.serve.errors import RequestError
from refract.serve.requests.content_encoding import STEP, Decoding
from refract.serve.requests.limits import Limits, OverloadedError

Answer = TypeVar("Answer")

WATCH_S = 0.05
"""Seconds after which a request is watched for a disconnect of its client."""


class Bodies:
    """Reads the bodies of one event loop, and counts the bytes in memory."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held = limits, 0

    async def read(self, request: Request) -> bytes:
        """Return the whole body of `request`, decoded by its Content-Encoding. Its bytes count as held until `release`.

        RequestError:
        - 413 beyond `limits.max_body_bytes`, as sent or decoded. Content-Length is checked before a byte is read, a chunked body while
          reading, as it has no length.
        - 415 for a coding that is not accepted.
        - 408 if the body does not arrive within `limits.body_seconds`.
        - 400 for an empty body, one that its coding cannot decode, or a client that disconnects.
        OverloadedError if all bodies together, incomplete ones too, would exceed `limits.max_held_bytes`.
        """
        announced = request.headers.get("content-length", "")
        digits = announced.lstrip("0")[:20] or "0"  # int() accepts at most 4,300 digits
        if announced.isdigit() and int(digits) > self._limits.max_body_bytes:
            raise _too_large(self._limits)
        sent = [value.decode("latin-1") for name, value in request.scope["headers"] if name == b"content-encoding"]
        decoding = Decoding(sent, self._limits.max_body_bytes)
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                await self._gather(request, decoding, chunks)
        except BaseException as err:  # also for a cancellation
            self._held -= sum(map(len, chunks))
            if isinstance(err, ClientDisconnect):
                message = "the client disconnected before its whole body arrived"
                raise RequestError(400, "client_disconnected", message) from err
            if isinstance(err, TimeoutError):
                limit = f"{self._limits.body_seconds:g} s"
                raise RequestError(408, "body_too_slow", f"the whole body did not arrive within {limit}") from err
            raise
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def release(self, body: bytes) -> None:
        """Stop counting `body` as held."""
        self._held -= len(body)

    @contextmanager
    def holding(self, body: bytes) -> Iterator[None]:
        """Count `body`, which another protocol received, as held until the block ends. OverloadedError as in `read`."""
        self._held += len(body)
        try:
            self._check_held()
            yield
        finally:
            self.release(body)

    def _check_held(self) -> None:
        if self._held > self._limits.max_held_bytes:
            raise OverloadedError("the request bodies in memory exceed the limit; try again later")

    async def _gather(self, request: Request, decoding: Decoding, chunks: list[bytes]) -> None:
        """Append the decoded pieces to `chunks`. If an error is raised, `chunks` holds the pieces so far."""
        sent = size = 0
        async for chunk in request.stream():
            sent += len(chunk)
            if sent > self._limits.max_body_bytes:
                raise _too_large(self._limits)
            for piece in decoding.pieces(chunk):
                if piece:
                    chunks.append(piece)
                    size += len(piece)
                    self._held += len(piece)
                self._check_held()
                if len(piece) == STEP:
                    await asyncio.sleep(0)
        if sent:
            decoding.finish()
        if size == 0:
            raise RequestError(400, "empty_body", "the request has no body; send an image")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """Return the result of `work`. If the client disconnects meanwhile, cancel it and raise RequestError. Read the body before."""
    task, watchers = asyncio.current_task(), []
    assert task is not None
    # Most requests finish before the cost of a watching task would be worth it.
    loop = asyncio.get_running_loop()
    timer = loop.call_later(WATCH_S, lambda: watchers.append(loop.create_task(_cancel_when_gone(request, task))))
    try:
        return await work
    except asyncio.CancelledError:
        if not (watchers and watchers[0].done()) or task.uncancel():  # cancelled for another reason
            raise
        raise RequestError(400, "client_disconnected", "the client disconnected before the response") from None
    finally:
        timer.cancel()
        for watcher in watchers:
            watcher.cancel()


async def _cancel_when_gone(request: Request, task: asyncio.Task[Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def _too_large(limits: Limits) -> RequestError:
    return RequestError(413, "body_too_large", f"the body is larger than {limits.max_body_bytes} bytes")
