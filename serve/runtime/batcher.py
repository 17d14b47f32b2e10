"""Many small requests, few large batches: a thread for each engine computes, the event loop waits. Knows nothing of HTTP."""

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
"""Input; its answer, with when its batch began and ended; time of arrival."""


class ClosedError(RuntimeError):
    """Nothing is taken any more."""


class BatchError(RuntimeError):
    """The engine failed on the batch that this input was in."""


class Answered(NamedTuple):
    """outputs: N×…; queued: seconds that the last of the inputs waited; computed: seconds that its batch took."""

    outputs: np.ndarray
    queued: float
    computed: float


class Batcher:
    """Gathers inputs into batches for `engines` (N×… → N×…), each of which runs on a thread of its own and takes its share when free.

    A batch leaves as soon as `max_batch` inputs wait, or no further ones are `coming`, or `max_wait_ms` after its first one arrived. At
    most `max_queue` inputs wait. While the engines are `brief`, the event loop computes what need not wait itself, by the first of them.
    Belongs to one event loop: build it, `start`, `submit` and `stop` it there.
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
                f"max_wait_ms={max_wait_ms} a finite number of at least 0"
            )
        self._coming, self._brief, self._first = coming, brief, engines[0]
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait_ms / 1000, max_queue
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._stopping = self._waking = False
        self._growing = self._computing = 0  # threads that wait for a batch to grow; inputs that threads compute
        self._due = 0  # inputs of a batch that may leave, of which a thread has taken its share
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
        """Inputs that wait for a batch."""
        return len(self._waiting)

    async def submit(self, inputs: np.ndarray) -> Answered:
        """The answers to N×… inputs. All are taken or none: OverloadedError, ClosedError after `stop`. BatchError if the engine failed."""
        now = monotonic()
        futures = [self._loop.create_future() for _ in inputs]
        with self._changed:
            if self._stopping:
                raise ClosedError("the server is going down")
            before = len(self._waiting)
            if before + len(futures) > self._max_queue:
                raise OverloadedError(f"{before} images are waiting already; try again later")
            self._waiting.extend(zip(inputs, futures, [now] * len(futures), strict=True))
        self._wake_soon()
        if len(futures) == 1:
            output, start, end = await futures[0]
            return Answered(output[None], start - now, end - start)
        rows = await asyncio.gather(*futures)
        outputs, began, ended = zip(*rows, strict=True)
        return Answered(np.stack(outputs), max(began) - now, ended[-1] - began[-1])

    def _wake_soon(self) -> None:
        if not self._waking:  # once all that the loop has at hand was submitted, so that it makes one batch
            self._waking = True
            self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        self._waking = False
        if items := self._own():
            _deliver(*_computed(self._first, items))
            if self._waiting:
                self._wake_soon()

    def _own(self) -> list[Item]:
        """What the loop is to compute itself; where that is nothing, the threads are woken."""
        with self._changed:
            leaving = len(self._waiting) >= self._max_batch or not self._coming()
            if leaving and not self._computing and not self._stopping and self._brief():
                return self._taken(self._max_batch)
            # The threads sleep until there is an input, then until the batch may leave: in between, let them sleep.
            if leaving or not self._growing:
                self._changed.notify_all()
            return []

    async def stop(self) -> None:
        """Take no more, answer what was taken, end the threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        # Whose they are holds this: what stays in a circle is freed when Python looks for garbage, which it seldom does here.
        self._threads.clear()
        self._first, self._coming, self._brief = np.asarray, bool, bool

    def _work(self, engine: Callable[[np.ndarray], np.ndarray]) -> None:
        while items := self._next():
            found = _computed(engine, items)
            with self._changed:
                self._computing -= len(items)
            try:
                # Once a batch, not once a request: each call wakes the event loop through a system call.
                self._loop.call_soon_threadsafe(_deliver, *found)
            except RuntimeError:
                logger.warning("the event loop closed before %d answers were delivered", len(items))

    def _next(self) -> list[Item]:
        """The next batch; empty when all is done. Sleeps on the condition, for as long as the batch may still grow."""
        with self._changed:
            while not self._stopping and (left := self._left()) > 0:
                growing = left < math.inf
                self._growing += growing
                self._changed.wait(left if growing else None)
                self._growing -= growing
            # A share for each engine: one that took all would keep the last ones from another that is free sooner.
            share = -(-(len(self._waiting) + self._computing) // len(self._threads))
            self._due = self._due or min(len(self._waiting), self._max_batch)
            items = self._taken(min(share, self._max_batch))
            self._computing += len(items)
            if self._due:
                self._changed.notify_all()
            return items

    def _taken(self, most: int) -> list[Item]:
        items = [self._waiting.popleft() for _ in range(min(len(self._waiting), most))]
        self._due = max(0, self._due - len(items))
        return items

    def _left(self) -> float:
        """Seconds until the batch that is growing leaves; without end where there is none, which another thread may have taken."""
        if not self._waiting:
            return math.inf
        if self._due or len(self._waiting) >= self._max_batch or not self._coming():
            return 0
        return self._waiting[0][2] + self._max_wait - monotonic()


def _computed(
    engine: Callable[[np.ndarray], np.ndarray], items: list[Item]
) -> tuple[list[Item], np.ndarray | None, float, float]:
    """Of those items that were not cancelled meanwhile: themselves, the answers, None where the engine failed, when it began and ended."""
    items = [item for item in items if not item[1].cancelled()]
    answers: np.ndarray | None = None
    began = monotonic()
    try:
        if items:
            answers = engine(np.stack([item[0] for item in items]))
            if len(answers) != len(items):
                raise ValueError(f"the engine gave {len(answers)} answers to {len(items)} inputs")
    except Exception:
        logger.exception("inference failed on a batch of %d", len(items))
        answers = None
    return items, answers, began, monotonic()


def _deliver(items: list[Item], answers: np.ndarray | None, began: float, ended: float) -> None:
    for row, (_, future, _) in enumerate(items):
        if future.done():  # cancelled while the batch was computed
            continue
        if answers is None:
            future.set_exception(BatchError("the engine failed on this batch"))
        else:
            future.set_result((answers[row], began, ended))
