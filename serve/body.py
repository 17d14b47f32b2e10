"""Reading a request's body without ever holding more than the limit."""

from starlette.requests import ClientDisconnect, Request

from serve.errors import RequestError
from serve.limits import Limits


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body of `request`.

    RequestError 413 beyond `limits.max_body_bytes`: by Content-Length before a byte is read, and while reading, for
    chunked bodies announce no length; 400 for an empty body, or a client that went away.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.max_body_bytes:
        raise _too_large(limits)
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limits.max_body_bytes:
                raise _too_large(limits)
            chunks.append(chunk)
    except ClientDisconnect as err:
        raise RequestError(400, "client_disconnected", "the client went away before its body had arrived") from err
    if size == 0:
        raise RequestError(400, "empty_body", "the request has no body; send an image")
    return b"".join(chunks)


def _too_large(limits: Limits) -> RequestError:
    return RequestError(413, "body_too_large", f"the body is larger than {limits.max_body_bytes} bytes")
