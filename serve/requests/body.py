"""Reading requests' bodies without ever holding more than the limits, of one request and of all together."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from refract.serve.http.errors import RequestError
from refract.serve.requests.content_encoding import STEP, Decoding
from refract.serve.requests.limits import Limits, OverloadedError

Answer = TypeVar("Answer")

WATCH_S = 0.05


class Bodies:
    """The bodies that one event loop holds at a time."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held = limits, 0

    async def read(self, request: Request) -> bytes:
        """The whole body of `request`, decoded by its Content-Encoding, counted as held until it is given to `release`.

        RequestError 413 beyond `limits.max_body_bytes`, as sent or decoded: by Content-Length before a byte is read, and
        while reading, for chunked bodies announce no length; 415 for a coding that is not accepted; 408 where it has not
        arrived within `limits.body_seconds`; 400 for an empty body, one that its coding cannot decode, or a client that
        went away. OverloadedError where all bodies together, half-sent ones too, would exceed `limits.max_held_bytes`.
        """
        announced = request.headers.get("content-length", "")
        digits = announced.lstrip("0")[:20] or "0"  # Python reads 4,300 at most
        if announced.isdigit() and int(digits) > self._limits.max_body_bytes:
            raise _too_large(self._limits)
        sent = [value.decode("latin-1") for name, value in request.scope["headers"] if name == b"content-encoding"]
        decoding = Decoding(sent, self._limits.max_body_bytes)
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                await self._gather(request, decoding, chunks)
        except BaseException as err:  # also where it is cancelled
            self._held -= sum(map(len, chunks))
            if isinstance(err, ClientDisconnect):
                message = "the client went away before its body had arrived"
                raise RequestError(400, "client_disconnected", message) from err
            if isinstance(err, TimeoutError):
                limit = f"{self._limits.body_seconds:g} s"
                raise RequestError(408, "body_too_slow", f"the body had not arrived within {limit}") from err
            raise
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def release(self, body: bytes) -> None:
        """It is needed no more."""
        self._held -= len(body)

    async def _gather(self, request: Request, decoding: Decoding, chunks: list[bytes]) -> None:
        """chunks: takes what has arrived and was decoded, also where the rest does not."""
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
                if self._held > self._limits.max_held_bytes:
                    raise OverloadedError("too many large requests at a time; try again")
                if len(piece) == STEP:
                    await asyncio.sleep(0)
        if sent:
            decoding.finish()
        if size == 0:
            raise RequestError(400, "empty_body", "the request has no body; send an image")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """The result of `work`, which is cancelled where the client goes away meanwhile: RequestError then. The body was read before."""
    own, watching = asyncio.current_task(), []
    assert own is not None
    # Most answers come sooner than a task to watch would pay for.
    loop = asyncio.get_running_loop()
    timer = loop.call_later(WATCH_S, lambda: watching.append(loop.create_task(_cancel_when_gone(request, own))))
    try:
        return await work
    except asyncio.CancelledError:
        if not (watching and watching[0].done()) or own.uncancel():  # cancelled by somebody else
            raise
        raise RequestError(400, "client_disconnected", "the client went away before its answer") from None
    finally:
        timer.cancel()
        for watch in watching:
            watch.cancel()


async def _cancel_when_gone(request: Request, task: asyncio.Task[Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def _too_large(limits: Limits) -> RequestError:
    return RequestError(413, "body_too_large", f"the body is larger than {limits.max_body_bytes} bytes")
