"""Being asked to stop: SIGTERM and Ctrl-C let work finish its step and keep what is needed to go on; a second Ctrl-C ends it at once."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

ASKED_TO_STOP = 75
"""The exit code after SIGTERM: nothing failed, `--resume` goes on (sysexits.h: temporary, try again)."""


class Stopped(Exception):
    """The work was asked to stop, and has stopped. signal: SIGTERM or SIGINT; run: a training's folder, once that is known."""

    run: Path | None = None

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class Stop:
    """signal: that asked for it, None so far; how: what is told then."""

    def __init__(self, how: str) -> None:
        self.signal: int | None = None
        self._how = how
        self._numbers: list[int] = []

    def listen(self) -> None:
        """Hear the signals (again)."""
        for number in self._numbers:
            signal.signal(number, self._note)

    def _note(self, number: int, _: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        again = "; Ctrl-C once more ends it at once" if number == signal.SIGINT else ""
        log.warning("stopping %s%s", self._how, again)


@contextmanager
def heard(how: str = "after this step, with a checkpoint to go on from") -> Iterator[Stop]:
    """Hear SIGTERM and SIGINT as long as the block runs. Outside the main thread nothing is heard."""
    stop = Stop(how)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # A background job of a shell has SIGINT ignored, and is left so.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop._numbers = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    stop.listen()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
