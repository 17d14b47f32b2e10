"""Combine many small requests into few large batches. A thread for each engine computes them. Independent of HTTP."""

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

import numpy as np

from refract.serve.requests.limits import OverloadedError

logger = logging.getLogger(__name__)

Item = tuple[np.ndarray, "asyncio.Future[tuple[np.ndarray, float, float]]", float]
"""(input, future of (output, start and end of its batch), time of arrival)."""


class ClosedError(RuntimeError):
    """The batcher is stopped and accepts no more inputs."""


class BatchError(RuntimeError):
    """The engine failed on the batch that contained this input."""


class Answered(NamedTuple):
    """The result of `Batcher.submit`. outputs: N×…; queued: seconds that the last input waited; computed: duration of its batch in
    seconds."""

    outputs: np.ndarray
    queued: float
    computed: float


class Batcher:
    """Gathers inputs into batches for `engines` (N×… → N×…). Each engine has its own thread, which takes a batch when it is idle.

    A batch starts when `max_batch` inputs wait, when `coming()` is False (no further input is in preparation), or `max_wait_ms` after its
    first input arrived. At most `max_queue` inputs wait. While `brief()` is True, the event loop itself computes a ready batch, with the
    first engine. Use it on one event loop only: build it, `start`, `submit` and `stop` it there.
    """

    def __init__(
        self,
        *engines: Callable[[np.ndarray], np.ndarray],
        max_batch: int = 32,
        max_wait_ms: float = 2.0,
        max_queue: int = 1024,
        coming: Callable[[], bool] = lambda: True,
        brief: Callable[[], bool] = lambda: False,
    ) -> None:
        if max_batch < 1 or max_queue < 1 or not 0 <= max_wait_ms < float("inf"):
            raise ValueError(
                f"Batcher: max_batch={max_batch} and max_queue={max_queue} must be at least 1, "
                f"max_wait_ms={max_wait_ms} must be finite and at least 0"
            )
        self._coming, self._brief, self._first = coming, brief, engines[0]
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait_ms / 1000, max_queue
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._stopping = self._waking = False
        self._growing = self._computing = 0  # threads that wait for a batch to grow; inputs that threads compute now
        self._due = 0  # remaining inputs of a batch that may start, of which a thread has taken a part
        self._threads = [
            threading.Thread(target=self._work, args=(engine,), name="inference", daemon=True) for engine in engines
        ]

    def start(self) -> None:
        """Start the inference threads. Call it once, on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """The number of inputs that wait for a batch."""
        return len(self._waiting)

    async def submit(self, inputs: np.ndarray) -> Answered:
        """Compute N×… inputs. Either all inputs are accepted or none. OverloadedError if the queue is full, ClosedError after `stop`,
        BatchError if the engine failed."""
        now = monotonic()
        futures = [self._loop.create_future() for _ in inputs]
        with self._changed:
            if self._stopping:
                raise ClosedError("the server is shutting down")
            waiting = len(self._waiting)
            if waiting + len(futures) > self._max_queue:
                raise OverloadedError(f"{waiting} images wait already, of at most {self._max_queue}; try again later")
            self._waiting.extend(zip(inputs, futures, [now] * len(futures), strict=True))
        self._wake_soon()
        if len(futures) == 1:
            output, start, end = await futures[0]
            return Answered(np.stack([output]), start - now, end - start)
        rows = await asyncio.gather(*futures)
        outputs, starts, ends = zip(*rows, strict=True)
        return Answered(np.stack(outputs), max(starts) - now, ends[-1] - starts[-1])

    def _wake_soon(self) -> None:
        if not self._waking:  # after the loop's pending calls, so that inputs submitted together form one batch
            self._waking = True
            self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        self._waking = False
        if items := self._items_for_loop():
            _deliver(*_computed(self._first, items))
            if self._waiting:
                self._wake_soon()

    def _items_for_loop(self) -> list[Item]:
        """The batch that the event loop computes itself. If it is empty, the threads are woken."""
        with self._changed:
            ready = len(self._waiting) >= self._max_batch or not self._coming()
            if ready and not self._computing and not self._stopping and self._brief():
                return self._taken(self._max_batch)
            # The threads need to wake for the first input and when the batch may start, not in between.
            if ready or not self._growing:
                self._changed.notify_all()
            return []

    async def stop(self) -> None:
        """Accept no more inputs, compute the accepted ones, and stop the threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        # The owner of these functions refers to this batcher. Break the cycle here: Python's garbage collection runs rarely in a server.
        self._threads.clear()
        self._first, self._coming, self._brief = np.asarray, bool, bool

    def _work(self, engine: Callable[[np.ndarray], np.ndarray]) -> None:
        while items := self._next():
            batch = _computed(engine, items)
            with self._changed:
                self._computing -= len(items)
            try:
                # One call a batch, not one a request: each call wakes the event loop through a system call.
                self._loop.call_soon_threadsafe(_deliver, *batch)
            except RuntimeError:
                logger.warning("the event loop closed before %d predictions were delivered", len(items))

    def _next(self) -> list[Item]:
        """Wait for the next batch while it may still grow, and return it. The batch is empty after `stop`, when no inputs remain."""
        with self._changed:
            while not self._stopping and (seconds := self._seconds_to_start()) > 0:
                growing = seconds < math.inf
                self._growing += growing
                self._changed.wait(seconds if growing else None)
                self._growing -= growing
            # Divide the inputs among the engines: otherwise the last inputs wait for this engine while another one is idle.
            count = -(-(len(self._waiting) + self._computing) // len(self._threads))
            self._due = self._due or min(len(self._waiting), self._max_batch)
            items = self._taken(min(count, self._max_batch))
            self._computing += len(items)
            if self._due:
                self._changed.notify_all()
            return items

    def _taken(self, most: int) -> list[Item]:
        items = [self._waiting.popleft() for _ in range(min(len(self._waiting), most))]
        self._due = max(0, self._due - len(items))
        return items

    def _seconds_to_start(self) -> float:
        """The seconds until the growing batch starts. Infinite if no inputs wait, as when another thread has taken them."""
        if not self._waiting:
            return math.inf
        if self._due or len(self._waiting) >= self._max_batch or not self._coming():
            return 0
        return self._waiting[0][2] + self._max_wait - monotonic()


def _computed(
    engine: Callable[[np.ndarray], np.ndarray], items: list[Item]
) -> tuple[list[Item], np.ndarray | None, float, float]:
    """Compute the items that were not cancelled. Returns (these items, outputs or None if the engine failed, start time, end time)."""
    items = [item for item in items if not item[1].cancelled()]
    outputs: np.ndarray | None = None
    start = monotonic()
    try:
        if items:
            outputs = engine(np.stack([item[0] for item in items]))
            if len(outputs) != len(items):
                raise ValueError(f"the engine returned {len(outputs)} outputs for {len(items)} inputs")
    except Exception:
        logger.exception("inference failed on a batch of %d", len(items))
        outputs = None
    return items, outputs, start, monotonic()


def _deliver(items: list[Item], outputs: np.ndarray | None, start: float, end: float) -> None:
    for row, (_, future, _) in enumerate(items):
        if future.done():  # cancelled while the batch was computed
            continue
        if outputs is None:
            future.set_exception(BatchError("the engine failed on this batch"))
        else:
            future.set_result((outputs[row], start, end))
