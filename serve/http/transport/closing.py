"""Close a connection without losing a response, in bounded time whatever the client does."""

import asyncio
from collections.abc import Callable
from typing import Any

WRITE_TIMEOUT_S = 60
"""Seconds in which a client must read some of the bytes that wait for it."""

LINGER_S, MAX_LINGER_S = 2, 30
"""Seconds in which a client that still sends can notice its response: since its last bytes, and in total."""

CHECK_INTERVAL_S = 0.5
"""Seconds between two checks of these limits."""


class ClosingTransport(asyncio.Transport):
    """A transport whose `close` has stages (RFC 9112, 9.6) if the client still sends: closing with unread bytes would discard the responses
    on their way. It aborts a connection whose client reads none of the written bytes."""

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, sending: Callable[[], bool]
    ) -> None:
        """sending: returns whether the client may still be sending."""
        super().__init__()
        self._transport, self._loop, self._sending = transport, loop, sending
        self._closing = self._lingering = self._hurried = False
        self._written_bytes = self._sent_bytes = 0  # accepted by `write`; passed on to the operating system
        self._sent_at = self._received_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def write(self, data: Any) -> None:
        if not self._closing:
            self._written_bytes += len(data)
            self._transport.write(data)

    def close(self) -> None:
        if self.is_closing():
            return
        self._closing, self._lingering = True, self._sending()
        if self._lingering:
            self._received_at = self._loop.time()
            self._transport.write_eof()
            self._transport.resume_reading()  # the protocol drops what it reads
        else:
            self._transport.close()
        self.watch()

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def pause_reading(self) -> None:
        if not self._closing:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def dropped(self) -> None:
        """Record that the client sent bytes after `close`."""
        self._received_at = self._loop.time()

    def watch(self) -> None:
        """Start the timer that enforces the limits on the client's reading and sending."""
        if self._timer is None:
            buffered = self._transport.get_write_buffer_size()
            self._sent_bytes, self._sent_at = self._written_bytes - buffered, self._loop.time()
            self._timer = self._loop.call_later(CHECK_INTERVAL_S, self._check)

    def shorten_linger(self) -> None:
        """Limit the total linger time to LINGER_S, because the server shuts down."""
        self._hurried = True

    def lost(self) -> None:
        """Stop the timer: the connection is lost."""
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        now, buffered = self._loop.time(), self._transport.get_write_buffer_size()
        if self._sent_bytes != self._written_bytes - buffered:
            self._sent_bytes, self._sent_at = self._written_bytes - buffered, now
        since_received, since_sent = now - self._received_at, now - self._sent_at
        if buffered:
            expired = since_sent >= WRITE_TIMEOUT_S
        elif self._lingering:
            max_linger = LINGER_S if self._hurried else MAX_LINGER_S
            expired = min(since_received, since_sent) >= LINGER_S or since_sent >= max_linger
        else:
            self._timer = None
            return
        if expired:
            self._transport.abort()
        else:
            self._timer = self._loop.call_later(CHECK_INTERVAL_S, self._check)
