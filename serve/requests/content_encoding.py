"""Decode the content codings of request bodies (RFC 9110, 8.4) piece by piece, so that no small body expands beyond the limit."""

import zlib
from collections.abc import Iterable, Iterator

from refract.serve.errors import RequestError

STEP = 256 << 10
"""Most bytes of a decoded piece. After each piece the event loop may run other requests."""

MOST_CODINGS, MOST_MEMBERS = 2, 10_000
"""Most codings of a body, and most gzip members of a body. Each one costs memory or time before it yields a byte."""

CODINGS = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}
"""Accepted names, in lower case, and their codings (RFC 9110, 8.4.1)."""

ACCEPTED = "gzip, deflate, identity"


class Decoding:
    """Decodes the compressed body of one request, piece by piece.

    names: the values of all `Content-Encoding` header fields; most: most bytes that each coding may decode to.
    RequestError 415 for a coding that is not accepted, or more than MOST_CODINGS.
    """

    def __init__(self, names: Iterable[str], most: int) -> None:
        tokens = [token.strip() for token in ",".join(names).split(",")]
        applied = [token.lower() for token in tokens if token and token.lower() != "identity"]
        unknown = next((name for name in applied if name not in CODINGS), None)
        if unknown is not None:
            raise _unsupported(f"Content-Encoding is {unknown[:40]!r}; accepted are {ACCEPTED}")
        if len(applied) > MOST_CODINGS:
            raise _unsupported(f"Content-Encoding names {len(applied)} codings; at most {MOST_CODINGS} are accepted")
        self._stages = [_Stage(CODINGS[name], most) for name in reversed(applied)]  # the last applied is decoded first

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Yield the decoded pieces of the next compressed `data`; some are empty. RequestError 400 for invalid data, 413 beyond `most`."""
        return _through(self._stages, data) if self._stages else iter((data,))

    def finish(self) -> None:
        """Raise RequestError 400 unless the stream of every coding is complete."""
        for stage in self._stages:
            stage.finish()


def _through(stages: list["_Stage"], data: bytes) -> Iterator[bytes]:
    if not stages:
        yield data
        return
    for piece in stages[0].pieces(data):
        yield from _through(stages[1:], piece)


class _Stage:
    """Decodes one coding. gzip may have several members (RFC 1952, 2.2). deflate is zlib's format, or the raw stream that some clients
    send."""

    def __init__(self, coding: str, most: int) -> None:
        self._coding, self._most = coding, most
        self._size = self._members = 0
        self._decoder: zlib._Decompress | None = None
        self._head = b""

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._decoder is None or (self._decoder.eof and self._coding == "gzip"):
                data = self._start_stream(data)
                if self._decoder is None:
                    return
            if self._decoder.eof:
                raise self._invalid("it has extra bytes after its end")
            yield from self._decoded(data)
            data = self._decoder.unused_data

    def finish(self) -> None:
        if self._decoder is None or not self._decoder.eof:
            raise self._invalid("it is truncated")

    def _start_stream(self, data: bytes) -> bytes:
        """Choose the decoder of a stream that starts with `data`. Returns `data` after the bytes held back before."""
        self._members += 1
        if self._members > MOST_MEMBERS:
            raise self._invalid(f"it has more than {MOST_MEMBERS:,} members")
        if self._coding == "gzip":
            if self._members > 1 and not data.startswith(b"\x1f"):
                raise self._invalid("it has extra bytes after its end")
            self._decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
            return data
        data, self._head = self._head + data, b""
        if len(data) < 2:
            self._head, self._members = data, 0
            return b""
        # RFC 1950, 2.2. A raw stream with these two bytes would start with a stored block and non-zero padding.
        wrapped = data[0] & 0x8F == 0x08 and int.from_bytes(data[:2]) % 31 == 0
        self._decoder = zlib.decompressobj(zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS)
        return data

    def _decoded(self, data: bytes) -> Iterator[bytes]:
        assert self._decoder is not None
        while True:
            try:
                piece = self._decoder.decompress(data, STEP)
            except zlib.error as err:
                raise self._invalid("it is damaged") from err
            self._size += len(piece)
            if self._size > self._most:
                raise RequestError(413, "body_too_large", f"the decoded body is larger than {self._most} bytes")
            yield piece
            data = self._decoder.unconsumed_tail
            if self._decoder.eof or not (data or len(piece) == STEP):
                return

    def _invalid(self, reason: str) -> RequestError:
        message = f"the body is not valid {self._coding}, as Content-Encoding says: {reason}"
        return RequestError(400, "invalid_content_encoding", message)


def _unsupported(message: str) -> RequestError:
    return RequestError(415, "unsupported_content_encoding", message, {"Accept-Encoding": ACCEPTED})
