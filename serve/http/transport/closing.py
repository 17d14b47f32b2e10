"""The way out of a connection: an end that loses no answer, and that comes whatever the client does."""

import asyncio
from collections.abc import Callable
from typing import Any

WRITE_S = 60
"""For a client to take something of what waits for it."""

LINGER_S, LONGEST_LINGER_S = 2, 30
"""For a client that still sends to notice its answer: since it sent something, and in all."""

LOOK_S = 0.5
"""Between two looks at whether that is so."""


class ClosingTransport(asyncio.Transport):
    """A transport whose `close` goes by stages (RFC 9112, 9.6) where the client still sends: where one closes before that was read, the
    answers are lost on their way. Who takes nothing of what was written is left."""

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, sending: Callable[[], bool]
    ) -> None:
        """sending: whether the client may be in the midst of sending."""
        super().__init__()
        self._transport, self._loop, self._sending = transport, loop, sending
        self._ending = self._lingering = self._hurried = False
        self._written = self._taken = 0
        self._taken_at = self._arrived_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def write(self, data: Any) -> None:
        if not self._ending:
            self._written += len(data)
            self._transport.write(data)

    def close(self) -> None:
        if self.is_closing():
            return
        self._ending, self._lingering = True, self._sending()
        if self._lingering:
            self._arrived_at = self._loop.time()
            self._transport.write_eof()
            self._transport.resume_reading()  # to be dropped
        else:
            self._transport.close()
        self.watch()

    def is_closing(self) -> bool:
        return self._ending or self._transport.is_closing()

    def pause_reading(self) -> None:
        if not self._ending:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def dropped(self) -> None:
        """Something has arrived after the end."""
        self._arrived_at = self._loop.time()

    def watch(self) -> None:
        """See that what was written is taken."""
        if self._timer is None:
            self._taken, self._taken_at = self._written - self._transport.get_write_buffer_size(), self._loop.time()
            self._timer = self._loop.call_later(LOOK_S, self._look)

    def end_soon(self) -> None:
        """Listen to nobody for long who still sends after the end."""
        self._hurried = True

    def lost(self) -> None:
        """There is nobody to watch."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        now, waiting = self._loop.time(), self._transport.get_write_buffer_size()
        if self._taken != self._written - waiting:
            self._taken, self._taken_at = self._written - waiting, now
        quiet_s, taken_s = now - self._arrived_at, now - self._taken_at
        if waiting:
            over = taken_s >= WRITE_S
        elif self._lingering:
            over = min(quiet_s, taken_s) >= LINGER_S or taken_s >= (LINGER_S if self._hurried else LONGEST_LINGER_S)
        else:
            self._timer = None
            return
        if over:
            self._transport.abort()
        else:
            self._timer = self._loop.call_later(LOOK_S, self._look)
