"""Reading requests' bodies without ever holding more than the limits, of one request and of all together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from serve.batcher import OverloadedError
from serve.errors import RequestError
from serve.limits import Limits


class Bodies:
    """The bodies that one event loop holds at a time."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held = limits, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body of `request`, counted as held until the block ends.

        RequestError 413 beyond `limits.max_body_bytes`: by Content-Length before a byte is read, and while reading, for
        chunked bodies announce no length; 400 for an empty body, or a client that went away. OverloadedError where all
        bodies together, half-sent ones too, would exceed `limits.max_held_bytes`.
        """
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._limits.max_body_bytes:
            raise _too_large(self._limits)
        chunks, size = [], 0
        try:
            async for chunk in request.stream():
                size += len(chunk)
                self._held += len(chunk)
                if size > self._limits.max_body_bytes:
                    raise _too_large(self._limits)
                if self._held > self._limits.max_held_bytes:
                    raise OverloadedError("too many large requests at a time; try again")
                chunks.append(chunk)
            if size == 0:
                raise RequestError(400, "empty_body", "the request has no body; send an image")
            yield b"".join(chunks)
        except ClientDisconnect as err:
            raise RequestError(400, "client_disconnected", "the client went away before its body had arrived") from err
        finally:
            self._held -= size


def _too_large(limits: Limits) -> RequestError:
    return RequestError(413, "body_too_large", f"the body is larger than {limits.max_body_bytes} bytes")
