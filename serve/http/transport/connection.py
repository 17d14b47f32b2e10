"""Receive the requests of one connection within bounds on bytes, on requests and on time."""

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

HEAD_TIMEOUT_S = 10
"""Seconds in which the head of a request must arrive, and in which a new connection must start one. A client that sends a byte now and then
therefore cannot hold a connection for ever."""

BODY_SHUTDOWN_S = 15
"""Seconds in which the rest of a body must arrive once the server shuts down."""

MAX_HEAD_BYTES, MAX_FIELDS = 64 << 10, 256
"""Largest head of a request, from the request line to the empty line after the fields, both included. MAX_HEAD_BYTES also bounds the bytes
between the chunks of a body and after the last one; there slightly more may pass, as they are checked piece by piece."""

MAX_PIECE_BYTES = 16 << 10
"""Most bytes that the parser receives at a time."""

MAX_TURN_BYTES, MAX_TURN_BODY_PARTS = 64 << 10, 1000
"""Most bytes, and most parts of bodies, that one connection parses before the event loop serves the others."""

INVALID = Problem(400, "invalid_http", "the bytes received are not a valid request of HTTP/1.1")

MAX_PIPELINED = 8
"""Most requests of one connection that wait for earlier responses. Bytes beyond them stay unparsed until a response is complete."""

_AUTHORITY = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")


class _RejectedError(Exception):
    """The connection accepts no more bytes; `problem` is its last response."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


def _invalid(detail: str) -> _RejectedError:
    return _RejectedError(Problem(400, "invalid_http", detail))


def _too_large() -> _RejectedError:
    message = f"the head of a request must have at most {MAX_HEAD_BYTES >> 10} KiB and {MAX_FIELDS} header fields"
    return _RejectedError(Problem(431, "head_too_large", message))


class _Flow(FlowControl):
    """Flow control that does not resume reading while `blocked` returns true: bytes that were read are still unparsed."""

    def __init__(self, transport: asyncio.Transport, blocked: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._blocked = blocked

    def resume_reading(self) -> None:
        if not self._blocked():
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with bounds and fixes. Without them uvicorn

    - waits for a request's head without a timeout, and accepts any number of bytes in it and of pipelined requests;
    - reports a disconnected client only to the last of several pipelined requests;
    - reads the body of a request with `Upgrade: h2c` as another request;
    - closes the connection while a body arrives, which loses the response."""

    transport: ClosingTransport
    _timer: asyncio.TimerHandle | None = None
    _unparsed = memoryview(b"")
    """Bytes that were read but not parsed."""
    _bare_bytes = 0
    """Bytes outside bodies since the last start or end of a head, part of a body, or end of a message."""
    _body_parts = 0
    """Parts of bodies in this turn of the event loop."""
    _host_fields = 0
    """Host fields of the current head."""
    _request_line: bytes | None = b""
    """The received bytes of a request line; None from its end to the end of its message."""
    _tail = b""
    """The last three parsed bytes of a head or of a chunked body."""
    _body_left: int | None = None
    """Missing bytes of a body of known length."""
    _in_head = _in_body = False
    _message_ended = False
    """Whether the last parsed bytes ended a message."""
    _last_response: bytes | None = None
    """The error response after which the connection closes; None while it accepts requests."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(ClosingTransport(transport, self.loop, self._client_may_send))
        self.flow = _Flow(self.transport, lambda: bool(self._unparsed) or self._last_response is not None)
        self._cycles: deque[RequestResponseCycle] = deque()
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            self.transport.dropped()
        elif self._last_response is None:
            self._unparsed = memoryview(bytes(self._unparsed) + data if self._unparsed else data)
            self._parse_turn()

    def _parse_turn(self) -> None:
        """Parse the bytes that were read: at most those of one turn, and none while MAX_PIPELINED requests wait."""
        self._body_parts = parsed = 0
        try:
            while (
                self._unparsed
                and parsed < MAX_TURN_BYTES
                and self._body_parts < MAX_TURN_BODY_PARTS
                and len(self.pipeline) <= MAX_PIPELINED
            ):
                piece = self._next_piece()
                self._unparsed = self._unparsed[len(piece) :]
                parsed += len(piece)
                self._bare_bytes += len(piece)
                if self._bare_bytes > MAX_HEAD_BYTES and not self._in_body:
                    raise _too_large()
                self._parse(piece)
                if self._bare_bytes > MAX_HEAD_BYTES:
                    raise _too_large()
        except (httptools.HttpParserError, _RejectedError) as err:
            self._reject(self._problem(err))
            return
        if self._unparsed:
            self.flow.pause_reading()
            if len(self.pipeline) <= MAX_PIPELINED:
                self.loop.call_soon(self._resume_parsing)
        elif not self.pipeline and (self._idle() or len(self.cycle.body) <= HIGH_WATER_LIMIT):
            self.flow.resume_reading()
        self._set_timers()

    def _resume_parsing(self) -> None:
        if self._unparsed and not self.transport.is_closing():
            self._parse_turn()

    def _next_piece(self) -> memoryview:
        """Return the next bytes to parse: at most MAX_PIECE_BYTES, and none beyond the end of a head or of a message, so that heads are
        measured exactly and every request line is checked."""
        piece = self._unparsed[:MAX_PIECE_BYTES]
        if self._request_line == b"":
            if blank := len(piece) - len(bytes(piece).lstrip(b"\r\n")):  # RFC 9112, 2.2
                return piece[:blank]
            self._bare_bytes = 0
        if self._body_left:
            return piece[: self._body_left]
        window = self._tail + piece
        if end := window.find(b"\r\n\r\n") + 1:
            piece, self._tail = piece[: end + 3 - len(self._tail)], b""
        else:
            self._tail = window[-3:]
        if self._request_line is not None:
            self._read_line(bytes(piece))
        return piece

    def _read_line(self, piece: bytes) -> None:
        line, ending, _ = ((self._request_line or b"") + piece).partition(b"\n")
        self._request_line = None if ending else line
        if ending and (problem := line_problem(line + ending)):
            raise _RejectedError(problem)

    def _problem(self, err: Exception) -> Problem:
        cause = err.__context__ or err  # httptools wraps the exceptions of its callbacks
        if isinstance(cause, _RejectedError):
            return cause.problem
        if isinstance(err, httptools.HttpParserInvalidMethodError):
            return unknown_method(self._request_line or b"") or INVALID
        return INVALID

    def on_message_begin(self) -> None:
        if self._request_line == b"":  # a request whose line `_next_piece` did not check
            raise _RejectedError(INVALID)
        self._unset_keepalive_if_required()
        self._in_head, self._message_ended, self._host_fields, self._body_left = True, False, 0, None
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # trailer fields after a body are ignored (RFC 9110, 6.5.1)
            return
        name, value = name.lower(), value.strip(b" \t")  # RFC 9110, 5.5
        if name == b"host":
            self._host_fields += 1
            if not host_is_valid(value):
                raise _invalid("the Host header field must be a host, with or without a port")
        elif name == b"content-length" and value.isdigit():
            self._body_left = int(value.lstrip(b"0")[:20] or b"0")  # the parser rejects values over 64 bits
        elif name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        elif name == b"transfer-encoding" and value.lower() != b"chunked":
            problem = Problem(501, "unknown_transfer_encoding", "the only supported Transfer-Encoding is chunked")
            raise _RejectedError(problem)
        self.headers.append((name, value))
        if len(self.headers) > MAX_FIELDS:
            raise _too_large()

    def on_headers_complete(self) -> None:
        self._in_head, self._bare_bytes = False, 0
        if self.parser.should_upgrade():  # `_parse` feeds the head again without the Upgrade field
            return
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # RFC 9110, 10.1.1
        elif self._host_fields == 0:
            raise _invalid("a request of HTTP/1.1 must have a Host header field")  # RFC 9112, 3.2
        if self._host_fields > 1:
            raise _invalid("a request must not have more than one Host header field")
        self.url = self._target()
        self._in_body = True
        self._stop_timer()
        super().on_headers_complete()
        self._cycles.append(self.cycle)

    def _target(self) -> bytes:
        """Return the request target in a form that uvicorn parses: a path, `*`, or the part of a URL after its host (RFC 9112, 3.2.2)."""
        if self.url.startswith(b"/"):
            return self.url
        if self.url == b"*":
            if self.parser.get_method() != b"OPTIONS":
                raise _invalid("the request target * is valid for OPTIONS only")  # RFC 9112, 3.2.4
            return self.url
        if (match := _AUTHORITY.match(self.url)) is None:
            raise _invalid("the request target must be a path that starts with /")
        rest = self.url[match.end() :]
        return rest if rest.startswith(b"/") else b"/" + rest

    def on_body(self, body: bytes) -> None:
        if self._body_left is not None:
            self._body_left -= len(body)
        self._bare_bytes = 0
        self._body_parts += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._bare_bytes = 0
        if not self.parser.should_upgrade():
            self._message_ended, self._in_body, self._body_left, self._request_line = True, False, None, b""
            super().on_message_complete()

    def on_response_complete(self) -> None:
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft().body.clear()  # bytes that the application did not read
        super().on_response_complete()
        if self._last_response is not None:
            self._close_if_answered()
        elif self._unparsed:
            self._resume_parsing()
        elif not self._message_ended:
            self._unset_keepalive_if_required()
            self._set_timers()

    def eof_received(self) -> None:
        self.transport.watch()  # the transport closes once the client has read everything

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.watch()

    def shutdown(self) -> None:
        self.transport.shorten_linger()
        super().shutdown()
        if self._in_body:
            self.loop.call_later(BODY_SHUTDOWN_S, self._reject_late_body)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._unset_keepalive_if_required()
        self.transport.lost()
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()
        self._unparsed = memoryview(b"")
        super().connection_lost(exc)

    def _parse(self, data: memoryview) -> None:
        """Feed `data` to the parser and ignore `Upgrade` fields (RFC 9110, 7.8).

        httptools assigns all bytes after a head with `Upgrade` to another protocol, and this server supports none. A new parser therefore
        receives the head without the field, and then the bytes after it."""
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

    def _reject(self, problem: Problem) -> None:
        """Accept no more bytes, and send `problem` after the responses to the complete requests."""
        response = problem.response({})
        fields = (*self.server_state.default_headers, *response.raw_headers, CLOSE_HEADER)
        head = b"".join(b"%s: %s\r\n" % field for field in fields)
        self._last_response = STATUS_LINE[problem.status] + head + b"\r\n" + response.body
        self._unparsed = memoryview(b"")
        self.flow.pause_reading()
        incomplete = self.cycle
        if incomplete is not None and incomplete.more_body and not incomplete.response_complete:
            if incomplete.response_started:
                self._last_response = b""
            incomplete.disconnected, incomplete.waiting_for_100_continue = True, False
            incomplete.message_event.set()
            if self.pipeline and self.pipeline[0][0] is incomplete:
                self.pipeline.popleft()
        self._close_if_answered()

    def _close_if_answered(self) -> None:
        if not all(cycle.response_complete or cycle.disconnected for cycle in self._cycles):
            return
        self.transport.write(self._last_response or b"")
        self.transport.close()

    def _client_may_send(self) -> bool:
        return self._in_body or self._last_response is not None or bool(self._unparsed) or self.flow.read_paused

    def _reject_late_body(self) -> None:
        """Reject a request whose body is still incomplete BODY_SHUTDOWN_S after the shutdown started."""
        if self._in_body and not self.transport.is_closing():
            self._reject(Problem(503, "not_ready", "the server is shutting down and the request body is incomplete"))

    def _set_timers(self) -> None:
        """Limit the time to the next head if no request is being answered.

        HEAD_TIMEOUT_S bounds the arrival of a head and of the rest of a rejected body; other bytes and empty lines do not extend it.
        Between requests the keep-alive timeout applies."""
        if not self._idle():
            return
        if not self._message_ended:
            self._start_timer()
            return
        self._stop_timer()
        if self.timeout_keep_alive_task is None:
            wait = self.timeout_keep_alive
            self.timeout_keep_alive_task = self.loop.call_later(wait, self.timeout_keep_alive_handler)

    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
