"""Show the progress of work that takes longer than two seconds: a bar on a terminal, else a log line every ten seconds."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

from refract import output

log = logging.getLogger(__name__)

T = TypeVar("T")

BAR_S, LINE_S = 2.0, 10.0
"""Seconds until a bar or a notice of slow imports appears; seconds between two lines."""

UNATTENDED = ("schedule", "completion", "torchrun")
"""Commands that may be silent: they wait for times, or the processes that they start report."""


class Progress:
    """The progress of counted work, as a context manager.

    title: what is done; total: the count at the end, None if unknown; unit: plural of what is counted; count: what an earlier process did.
    clock: seconds, replaced in tests. Shows nothing with --quiet.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        *,
        unit: str = "images",
        count: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._total, self._unit, self._clock = title, total, unit, clock
        self._first = self._count = count
        self._start = self._last_line = clock()
        self._bar: Any = None
        self._redirected = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if _draws_bars() and not output.is_quiet():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._redirected.enter_context(logging_redirect_tqdm())
            self._redirected.enter_context(_reporter.hidden())
            self._bar = tqdm(
                total=self._total,
                desc=self._title,
                unit=f" {self._unit}",
                initial=self._first,
                leave=False,
                delay=BAR_S,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._redirected.close()

    def update(self, count: int = 1) -> None:
        """Add to the count, and show it if it is time."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
            _reporter.hear()
        elif (now := self._clock()) - self._last_line >= LINE_S:
            self._last_line = now
            log.info("%s", self._line(now))

    def _line(self, now: float) -> str:
        rate = (self._count - self._first) / max(now - self._start, 1e-9)
        if self._total is None:
            return f"{self._title}: {self._count:,} {self._unit}, {rate:,.3g} a second"
        remaining = (self._total - self._count) / rate if rate else 0.0
        return (
            f"{self._title}: {self._count:,} of {self._total:,} {self._unit} ({self._count / max(self._total, 1):.0%}), "
            f"{rate:,.3g} a second, {_duration(remaining)} left"
        )


def tracked(items: Iterable[T], title: str, total: int | None = None, *, unit: str = "images") -> Iterator[T]:
    """Yield the items and show the progress through them."""
    with Progress(title, total, unit=unit) as progress:
        for item in items:
            yield item
            progress.update()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


class _Reporter(logging.Handler):
    """Reports what a command does while it logs nothing, in a thread between `start` and `stop`.

    last: when the command logged or drew a bar for the last time, in `time.monotonic` seconds. stage: what the command does, None if it
    names no stages; count, total: the finished parts and all parts of the stage, None if it has no parts.
    """

    last = 0.0
    stage: str | None = None
    count = 0
    total: int | None = None
    _bar: Any = None
    _others = 0
    _thread: threading.Thread | None = None

    def start(self, command: str) -> None:
        self._command, self._start, self._ended = command, time.monotonic(), threading.Event()
        self.stage, self.count, self.total = None, 0, None
        self.hear()
        logging.getLogger("refract").addHandler(self)
        self._thread = threading.Thread(target=self._report, name="silence", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the reports and erase the bar."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        self._thread = None
        logging.getLogger("refract").removeHandler(self)

    def hear(self) -> None:
        self.last = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.hear()
        self.clear()

    def clear(self) -> None:
        if self._bar is not None:
            self._bar.clear()

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Draw no bar of the stage while another bar is open."""
        self._others += 1
        self.clear()
        try:
            yield
        finally:
            self._others -= 1

    def _report(self) -> None:
        on_terminal = _draws_bars()
        if not self._ended.wait(BAR_S) and _main_thread_imports() and not (on_terminal and self.stage):
            self._print("loading libraries")
        while not self._ended.wait(LINE_S / 10):
            if on_terminal and self.stage:
                if not self._others:
                    self._draw(self.stage)
            elif time.monotonic() - self.last >= LINE_S:
                parts = "" if self.total is None else f" ({self.count + 1} of {self.total})"
                self._print(f"{self.stage or 'in progress'}{parts}, {_duration(time.monotonic() - self._start)} so far")
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str) -> None:
        print(f"refract {self._command}: {text}", file=sys.stderr, flush=True)
        self.hear()

    def _draw(self, stage: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(leave=False, file=sys.stderr, bar_format=" ")
        parts = "" if self.total is None else ": {bar:20} {n_fmt}/{total_fmt}"
        self._bar.bar_format = f"{{desc}}{parts}, {{elapsed}}"
        self._bar.n, self._bar.total = self.count, self.total
        self._bar.set_description_str(stage)


_reporter = _Reporter()


def stage(text: str, count: int = 0, total: int | None = None) -> None:
    """Name what the command does now. count, total: the finished parts of this stage and all its parts, if it has several."""
    _reporter.stage, _reporter.count, _reporter.total = text, count, total


@contextlib.contextmanager
def staged(text: str) -> Iterator[None]:
    """Name what the command does in this block. Afterwards the stage is the one before."""
    before = _reporter.stage, _reporter.count, _reporter.total
    stage(text)
    try:
        yield
    finally:
        _reporter.stage, _reporter.count, _reporter.total = before
        _reporter.clear()


def clear() -> None:
    """Erase the bar of the stages before a line is printed. It appears again within a second."""
    _reporter.clear()


def finish() -> None:
    """End the reports on stages and silence, as a server does when it is ready."""
    _reporter.stop()


@contextlib.contextmanager
def silence_reported(command: str) -> Iterator[None]:
    """Print a line to the standard error when the command was silent for ten seconds, or imported its libraries for two.

    On a terminal, a command that names its stages shows them in a bar instead. Of the ranks of a training, only rank 0 prints.
    """
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"  # of torchrun; of Lightning on one machine
    if output.is_quiet() or command in UNATTENDED or rank != "0":
        yield
        return
    _reporter.start(command)
    try:
        yield
    finally:
        _reporter.stop()


def _draws_bars() -> bool:
    """Whether the standard error is a terminal with columns. Without any, as under `script` or on a serial console, lines report."""
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # a stream in memory, or one that does not know its size
        return True


def _main_thread_imports() -> bool:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_globals.get("__name__") != "importlib._bootstrap":
        frame = frame.f_back
    return frame is not None
