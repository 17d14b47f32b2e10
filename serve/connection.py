"""What arrives on one connection, bounded: in bytes, in requests and in time. Knows nothing of what is asked."""

import asyncio
from collections import deque
from collections.abc import Callable

import httptools
from uvicorn.protocols.http.flow_control import CLOSE_HEADER, HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from serve.errors import Problem

HEAD_S = 10
"""For a request's head to arrive, and for a connection to begin one: who sends a byte now and then holds no connection for ever."""

WRITE_S = 60
"""For a client to take something of an answer that waits for it."""

LINGER_S = 2
"""For a client that was refused to notice."""

HEAD_BYTES, FIELDS = 64 << 10, 256
"""Of a head; of what follows the last chunk of a body, the bytes alone. A little more may pass, as it is looked at in parts."""

PART, TURN = 16 << 10, 64 << 10
"""Bytes that are taken apart at a time, and at most before the event loop turns to others."""

WAITING = 8
"""Requests of one connection that wait for the answers before theirs; what is sent beyond is not taken apart meanwhile."""


class _TooLargeError(Exception):
    """A head beyond HEAD_BYTES or FIELDS."""


class _Flow(FlowControl):
    """Reads no more while something that was read is not taken apart."""

    def __init__(self, transport: asyncio.Transport, held: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._held = held

    def resume_reading(self) -> None:
        if not self._held():
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, which by itself waits for a request's head without end, takes any number of bytes for it and of requests that
    follow, of several that were sent at once tells only the last that its client is gone, and takes the body of who would speak another
    protocol (`Upgrade: h2c`) for a request."""

    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _rest = memoryview(b"")
    """What was read and not taken apart."""
    _bare = 0
    """Bytes since a head, a body's part or a message ended."""
    _heading = _ended = False
    """In a head; the last that was taken apart ended a message."""
    _refusal: bytes | None = None
    """The last that will be said here."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, lambda: bool(self._rest) or self._refusal is not None)
        self._cycles: deque[RequestResponseCycle] = deque()
        self._hurry()

    def data_received(self, data: bytes) -> None:
        if self._refusal is None:
            self._rest = memoryview(bytes(self._rest) + data if self._rest else data)
            self._go_on()

    def _go_on(self) -> None:
        """Take apart what was read: a part of it, where it is much or many requests wait."""
        self._unset_keepalive_if_required()
        self._ended, taken = False, 0
        try:
            while self._rest and taken < TURN and len(self.pipeline) <= WAITING:
                part, self._rest = self._rest[:PART], self._rest[PART:]
                taken += len(part)
                self._bare += len(part)
                self._parse(part)
                if self._bare > HEAD_BYTES:
                    raise _TooLargeError
        except (httptools.HttpParserError, _TooLargeError) as err:
            if isinstance(err.__context__ or err, _TooLargeError):
                told = f"a request's head has at most {HEAD_BYTES >> 10} KiB and {FIELDS} fields"
                self._refuse(Problem(431, "head_too_large", told))
            else:
                self._refuse(Problem(400, "invalid_http", "this is no request of HTTP/1.1"))
            return
        if self._rest:
            self.flow.pause_reading()
            if taken >= TURN:
                self.loop.call_soon(self._take_up)
        elif not self.pipeline and (self._idle() or len(self.cycle.body) <= HIGH_WATER_LIMIT):
            self.flow.resume_reading()
        self._watch()

    def _take_up(self) -> None:
        if self._rest and not self.transport.is_closing():
            self._go_on()

    def on_message_begin(self) -> None:
        self._heading, self._ended = True, False
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._heading:  # what follows a body is passed over (RFC 9110, 6.5.1)
            return
        super().on_header(name, value)
        if len(self.headers) > FIELDS:
            raise _TooLargeError

    def on_headers_complete(self) -> None:
        self._heading, self._bare = False, 0
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
            self._ended = True
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._refusal is not None:
            self._end()
        else:
            self._take_up()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        if self._stalled is not None:
            self._stalled.cancel()
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

    def _refuse(self, problem: Problem) -> None:
        """Take nothing more, and say why when what was whole has its answers."""
        answer = problem.response({})
        fields = b"".join(b"%s: %s\r\n" % field for field in (*answer.raw_headers, CLOSE_HEADER))
        self._refusal = STATUS_LINE[problem.status] + fields + b"\r\n" + answer.body
        self._rest = memoryview(b"")
        self.flow.pause_reading()
        broken = self.cycle
        if broken is not None and broken.more_body and not broken.response_complete:  # its body will not come
            if broken.response_started:
                self._refusal = b""
            broken.disconnected = True
            broken.message_event.set()
            if self.pipeline and self.pipeline[0][0] is broken:
                self.pipeline.popleft()
        self._end()

    def _end(self) -> None:
        if not all(cycle.response_complete or cycle.disconnected for cycle in self._cycles):
            return
        if not self._refusal or self.transport.is_closing():
            self.transport.close()
            return
        self.transport.write(self._refusal)
        # What arrives still is read and dropped for a while: where one closes before, the answers are lost on their way.
        self.transport.write_eof()
        self.transport.resume_reading()
        self._calm()
        self._timer = self.loop.call_later(LINGER_S, self.transport.abort)

    def _watch(self) -> None:
        """Where nothing is being answered, a head must arrive soon, and the rest of a body that was refused. What arrives and is neither
        does not put it off. Between requests a connection may rest."""
        if not self._idle():
            return
        if not self._ended:
            self._hurry()
            return
        self._calm()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _idle(self) -> bool:
        """Nothing is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _hurry(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _calm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
