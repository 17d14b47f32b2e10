"""What arrives on one connection, bounded: in bytes and in time. Knows nothing of what is asked."""

import asyncio
import json
from collections import deque
from http import HTTPStatus

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEAD_S = 10
"""For a request's head to arrive, and for a connection to begin one: who sends a byte now and then holds no connection for ever."""

HEAD_BYTES, FIELDS = 64 << 10, 256
"""Of a head, or of what follows the last chunk of a body: a little more may pass, as it is looked at in parts of that size."""


class _TooLargeError(Exception):
    """A head beyond HEAD_BYTES or FIELDS."""


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, which by itself waits for a request's head without end and takes any number of bytes for it, of several requests
    that were sent at once tells only the last that its client is gone, and takes the body of who would speak another protocol
    (`Upgrade: h2c`) for a request."""

    _timer: asyncio.TimerHandle | None = None
    _bare = 0
    """Bytes since a head, a body's part or a message ended."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._cycles: deque[RequestResponseCycle] = deque()
        self._hurry()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            for start in range(0, len(data), HEAD_BYTES):
                part = memoryview(data)[start : start + HEAD_BYTES]
                self._bare += len(part)
                self._parse(part)
                if self._bare > HEAD_BYTES:
                    raise _TooLargeError
        except (httptools.HttpParserError, _TooLargeError) as err:
            if isinstance(err.__context__ or err, _TooLargeError):
                told = f"a request's head has at most {HEAD_BYTES >> 10} KiB and {FIELDS} fields"
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head_too_large", told)
            else:
                self._refuse(HTTPStatus.BAD_REQUEST, "invalid_http", "this is no request of HTTP/1.1")
        else:
            self._hurry()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > FIELDS:
            raise _TooLargeError

    def on_headers_complete(self) -> None:
        self._bare = 0
        if self.parser.should_upgrade():  # it comes again, without the header
            return
        self._calm()
        super().on_headers_complete()
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._bare = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._bare = 0
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def _parse(self, data: memoryview) -> None:
        """httptools takes all that follows a head with `Upgrade` for another protocol's. Nobody here speaks one, so the header is passed
        over (RFC 9110, 7.8): the head goes without it into a parser of its own, and what follows after it."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                head, data = self._plain_head(), data[upgrade.args[0] :]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self.parser.feed_data(head)

    def _plain_head(self) -> bytes:
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise httptools.HttpParserError("this is no proxy")
        first = b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())
        fields = (b"%s: %s" % field for field in self.headers if field[0] != b"upgrade")
        return b"\r\n".join((first, *fields, b"", b""))

    def _refuse(self, status: HTTPStatus, code: str, detail: str) -> None:
        """Where nothing is being answered, by a problem (RFC 9457); what is would be torn by it."""
        if self.cycle is None or self.cycle.response_complete:
            problem = {"type": "about:blank", "title": status.phrase, "status": status, "code": code, "detail": detail}
            body = json.dumps(problem).encode()
            head = f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: application/problem+json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _hurry(self) -> None:
        """Where nothing is being answered, a head must arrive soon. What arrives and is none does not put it off."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _calm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
