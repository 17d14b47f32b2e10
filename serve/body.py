"""Reading requests' bodies without ever holding more than the limits, of one request and of all together."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from serve.errors import RequestError
from serve.limits import Limits, OverloadedError

Answer = TypeVar("Answer")


class Bodies:
    """The bodies that one event loop holds at a time."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held = limits, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body of `request`, counted as held until the block ends.

        RequestError 413 beyond `limits.max_body_bytes`: by Content-Length before a byte is read, and while reading, for
        chunked bodies announce no length; 408 where it has not arrived within `limits.body_seconds`; 400 for an empty body, or
        a client that went away. OverloadedError where all bodies together, half-sent ones too, would exceed
        `limits.max_held_bytes`.
        """
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._limits.max_body_bytes:
            raise _too_large(self._limits)
        held: list[int] = []
        try:
            yield await self._whole(request, held)
        finally:
            self._held -= sum(held)

    async def _whole(self, request: Request, held: list[int]) -> bytes:
        """held: takes the sizes of what has arrived, also where the rest does not."""
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in request.stream():
                    held.append(len(chunk))
                    size += len(chunk)
                    self._held += len(chunk)
                    if size > self._limits.max_body_bytes:
                        raise _too_large(self._limits)
                    if self._held > self._limits.max_held_bytes:
                        raise OverloadedError("too many large requests at a time; try again")
                    chunks.append(chunk)
        except ClientDisconnect as err:
            raise RequestError(400, "client_disconnected", "the client went away before its body had arrived") from err
        except TimeoutError as err:
            limit = f"{self._limits.body_seconds:g} s"
            raise RequestError(408, "body_too_slow", f"the body had not arrived within {limit}") from err
        if size == 0:
            raise RequestError(400, "empty_body", "the request has no body; send an image")
        return b"".join(chunks)


async def unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """The result of `work`, which is cancelled where the client goes away meanwhile: RequestError then. The body was read before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError(400, "client_disconnected", "the client went away before its answer")
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_large(limits: Limits) -> RequestError:
    return RequestError(413, "body_too_large", f"the body is larger than {limits.max_body_bytes} bytes")
