"""What arrives on one connection, bounded: in bytes, in requests and in time. Knows nothing of what is asked."""

import asyncio
import re
from collections import deque
from collections.abc import Callable

import httptools
from uvicorn.protocols.http.flow_control import CLOSE_HEADER, HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from refract.serve.http.errors import Problem
from refract.serve.http.transport.closing import ClosingTransport
from refract.serve.http.transport.request_head import host_is_valid, line_problem, unknown_method

HEAD_S = 10
"""For a request's head to arrive, and for a connection to begin one: who sends a byte now and then holds no connection for ever."""

LEAVE_S = 15
"""For the rest of a body, from the moment when the server is asked to end."""

HEAD_BYTES, FIELDS = 64 << 10, 256
"""Of a head, from the request line to the empty line after its fields, both included. The bytes also bound what stands between the chunks
of a body, and follows the last; there a little more may pass, as it is looked at in parts."""

PART, TURN, PIECES = 16 << 10, 64 << 10, 1000
"""Bytes that are taken apart at a time; and at most, or parts of bodies, before the event loop turns to others."""

INVALID = Problem(400, "invalid_http", "this is not a request of HTTP/1.1")

WAITING = 8
"""Requests of one connection that wait for the answers before theirs; what is sent beyond is not taken apart meanwhile."""


_AUTHORITY = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")


class _RefusedError(Exception):
    """Nothing more is taken on this connection."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


def _invalid(detail: str) -> _RefusedError:
    return _RefusedError(Problem(400, "invalid_http", detail))


def _too_large() -> _RefusedError:
    message = f"a request's head has at most {HEAD_BYTES >> 10} KiB and {FIELDS} fields"
    return _RefusedError(Problem(431, "head_too_large", message))


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
    follow, of several that were sent at once tells only the last that its client is gone, takes the body of who would speak another
    protocol (`Upgrade: h2c`) for a request, and closes while a body arrives whose answer is then lost."""

    transport: ClosingTransport
    _timer: asyncio.TimerHandle | None = None
    _rest = memoryview(b"")
    """What was read and not taken apart."""
    _bare = _pieces = _hosts = 0
    """Bytes since a head began or ended, or a body's part or a message ended; parts of bodies in this turn; Host fields of a head."""
    _line: bytes | None = b""
    """The bytes of a request line that have arrived; None from its end to the end of its message."""
    _last = b""
    """The last three bytes of a head, or of a chunked body, that were taken apart."""
    _left: int | None = None
    """Bytes that a body of known length still has."""
    _heading = _bodied = _ended = False
    """In a head; in a body; the last that was taken apart ended a message."""
    _refusal: bytes | None = None
    """The last that will be said here."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(ClosingTransport(transport, self.loop, self._sending))
        self.flow = _Flow(self.transport, lambda: bool(self._rest) or self._refusal is not None)
        self._cycles: deque[RequestResponseCycle] = deque()
        self._hurry()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            self.transport.dropped()
        elif self._refusal is None:
            self._rest = memoryview(bytes(self._rest) + data if self._rest else data)
            self._go_on()

    def _go_on(self) -> None:
        """Take apart what was read: a part of it, where it is much or many requests wait."""
        self._pieces = taken = 0
        try:
            while self._rest and taken < TURN and self._pieces < PIECES and len(self.pipeline) <= WAITING:
                part = self._portion()
                self._rest = self._rest[len(part) :]
                taken += len(part)
                self._bare += len(part)
                if self._bare > HEAD_BYTES and not self._bodied:
                    raise _too_large()
                self._parse(part)
                if self._bare > HEAD_BYTES:
                    raise _too_large()
        except (httptools.HttpParserError, _RefusedError) as err:
            self._refuse(self._problem(err))
            return
        if self._rest:
            self.flow.pause_reading()
            if len(self.pipeline) <= WAITING:
                self.loop.call_soon(self._take_up)
        elif not self.pipeline and (self._idle() or len(self.cycle.body) <= HIGH_WATER_LIMIT):
            self.flow.resume_reading()
        self._watch()

    def _take_up(self) -> None:
        if self._rest and not self.transport.is_closing():
            self._go_on()

    def _portion(self) -> memoryview:
        """The next bytes to take apart: no more than PART, and none beyond the end of a head or of a message, so that heads are measured
        exactly and each request line is read."""
        part = self._rest[:PART]
        if self._line == b"":
            if blank := len(part) - len(bytes(part).lstrip(b"\r\n")):  # RFC 9112, 2.2
                return part[:blank]
            self._bare = 0
        if self._left:
            return part[: self._left]
        known = self._last + part
        if end := known.find(b"\r\n\r\n") + 1:
            part, self._last = part[: end + 3 - len(self._last)], b""
        else:
            self._last = known[-3:]
        if self._line is not None:
            self._read_line(bytes(part))
        return part

    def _read_line(self, part: bytes) -> None:
        line, ending, _ = ((self._line or b"") + part).partition(b"\n")
        self._line = None if ending else line
        if ending and (problem := line_problem(line + ending)):
            raise _RefusedError(problem)

    def _problem(self, err: Exception) -> Problem:
        own = err.__context__ or err  # httptools wraps what its callbacks raise
        if isinstance(own, _RefusedError):
            return own.problem
        if isinstance(err, httptools.HttpParserInvalidMethodError):
            return unknown_method(self._line or b"") or INVALID
        return INVALID

    def on_message_begin(self) -> None:
        if self._line == b"":  # a request that `_portion` does not know of
            raise _RefusedError(INVALID)
        self._unset_keepalive_if_required()
        self._heading, self._ended, self._hosts, self._left = True, False, 0, None
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._heading:  # what follows a body is passed over (RFC 9110, 6.5.1)
            return
        name, value = name.lower(), value.strip(b" \t")  # RFC 9110, 5.5
        if name == b"host":
            self._hosts += 1
            if not host_is_valid(value):
                raise _invalid("the Host header field is not a host, or a host and a port")
        elif name == b"content-length" and value.isdigit():
            self._left = int(value.lstrip(b"0")[:20] or b"0")  # the parser refuses more digits than fit
        elif name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        elif name == b"transfer-encoding" and value.lower() != b"chunked":
            problem = Problem(501, "unknown_transfer_encoding", "Transfer-Encoding: chunked alone is known")
            raise _RefusedError(problem)
        self.headers.append((name, value))
        if len(self.headers) > FIELDS:
            raise _too_large()

    def on_headers_complete(self) -> None:
        self._heading, self._bare = False, 0
        if self.parser.should_upgrade():  # it comes again, without the header
            return
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # RFC 9110, 10.1.1
        elif self._hosts == 0:
            raise _invalid("a request of HTTP/1.1 has a Host header field")  # RFC 9112, 3.2
        if self._hosts > 1:
            raise _invalid("a request has one Host header field at most")
        self.url = self._target()
        self._bodied = True
        self._calm()
        super().on_headers_complete()
        self._cycles.append(self.cycle)

    def _target(self) -> bytes:
        """In the forms that uvicorn takes apart: of a URL what follows its host (RFC 9112, 3.2.2), and `*`."""
        if self.url.startswith(b"/"):
            return self.url
        if self.url == b"*":
            if self.parser.get_method() != b"OPTIONS":
                raise _invalid("the target * goes with OPTIONS alone")  # RFC 9112, 3.2.4
            return self.url
        if (match := _AUTHORITY.match(self.url)) is None:
            raise _invalid("the target of the request is not a path, which begins with /")
        rest = self.url[match.end() :]
        return rest if rest.startswith(b"/") else b"/" + rest

    def on_body(self, body: bytes) -> None:
        if self._left is not None:
            self._left -= len(body)
        self._bare = 0
        self._pieces += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._bare = 0
        if not self.parser.should_upgrade():
            self._ended, self._bodied, self._left, self._line = True, False, None, b""
            super().on_message_complete()

    def on_response_complete(self) -> None:
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft().body.clear()  # what of it nobody asked for
        super().on_response_complete()
        if self._refusal is not None:
            self._end()
        elif self._rest:
            self._take_up()
        elif not self._ended:
            self._unset_keepalive_if_required()
            self._watch()

    def eof_received(self) -> None:
        self.transport.watch()  # it is closed when all was taken

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.watch()

    def shutdown(self) -> None:
        self.transport.end_soon()
        super().shutdown()
        if self._bodied:
            self.loop.call_later(LEAVE_S, self._leave)

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        self._unset_keepalive_if_required()
        self.transport.lost()
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()
        self._rest = memoryview(b"")
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
            raise httptools.HttpParserError("this server is not a proxy")
        first = b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())
        fields = (b"%s: %s" % field for field in self.headers if field[0] != b"upgrade")
        return b"\r\n".join((first, *fields, b"", b""))

    def _refuse(self, problem: Problem) -> None:
        """Take nothing more, and say why when what was whole has its answers."""
        answer = problem.response({})
        fields = (*self.server_state.default_headers, *answer.raw_headers, CLOSE_HEADER)
        head = b"".join(b"%s: %s\r\n" % field for field in fields)
        self._refusal = STATUS_LINE[problem.status] + head + b"\r\n" + answer.body
        self._rest = memoryview(b"")
        self.flow.pause_reading()
        broken = self.cycle
        if broken is not None and broken.more_body and not broken.response_complete:  # its body will not come
            if broken.response_started:
                self._refusal = b""
            broken.disconnected, broken.waiting_for_100_continue = True, False
            broken.message_event.set()
            if self.pipeline and self.pipeline[0][0] is broken:
                self.pipeline.popleft()
        self._end()

    def _end(self) -> None:
        if not all(cycle.response_complete or cycle.disconnected for cycle in self._cycles):
            return
        self.transport.write(self._refusal or b"")
        self.transport.close()

    def _sending(self) -> bool:
        return self._bodied or self._refusal is not None or bool(self._rest) or self.flow.read_paused

    def _leave(self) -> None:
        """The server waits for nothing any more."""
        if self._bodied and not self.transport.is_closing():
            self._refuse(Problem(503, "not_ready", "the server is going down, and the body had not arrived"))

    def _watch(self) -> None:
        """Where nothing is being answered, a head must arrive soon, and the rest of a body that was refused. What arrives and is neither
        does not put it off, nor do empty lines. Between requests a connection may rest."""
        if not self._idle():
            return
        if not self._ended:
            self._hurry()
            return
        self._calm()
        if self.timeout_keep_alive_task is None:
            wait = self.timeout_keep_alive
            self.timeout_keep_alive_task = self.loop.call_later(wait, self.timeout_keep_alive_handler)

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
