"""Handle stop requests: SIGTERM and Ctrl-C finish the current step and save the progress, a second Ctrl-C stops at once."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

ASKED_TO_STOP = 75
"""The exit code after SIGTERM: nothing failed, and `--resume` resumes (EX_TEMPFAIL of sysexits.h)."""


class Stopped(Exception):
    """The work has stopped on request. signal: SIGTERM or SIGINT; run: the training's folder, None until it exists."""

    run: Path | None = None

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class Stop:
    """A stop request. signal: the received signal, None so far; plan: how the work stops, for the log."""

    def __init__(self, plan: str) -> None:
        self.signal: int | None = None
        self._plan = plan
        self._numbers: list[int] = []

    def install(self) -> None:
        """Install the signal handlers, also after another library replaced them."""
        for number in self._numbers:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        hint = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        log.warning("stopping %s%s", self._plan, hint)


@contextmanager
def stop_requests(plan: str = "after this step, with a checkpoint to resume from") -> Iterator[Stop]:
    """Handle SIGTERM and SIGINT while the block runs. Outside the main thread no handler is installed."""
    stop = Stop(plan)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # A shell's background job ignores SIGINT; this stays so.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop._numbers = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    stop.install()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
