"""One model's way: its engine, its batcher, and the requests that are on it. Knows nothing of HTTP."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from refract.serve.http.metrics import Metrics
from refract.serve.requests.limits import Budget
from refract.serve.runtime.batcher import Answered, Batcher
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.engine_statistics import Statistics
from refract.serve.runtime.pools import RECENT, PricedPool

logger = logging.getLogger(__name__)

FAILURES = 3
"""Batches in a row that failed, after which the self-test is run again."""

AGAIN_S = 1.0
"""Until a self-test that failed is tried again: memory may have been short for a moment."""


BRIEF_S = 0.001
"""The event loop itself computes batches that take less of a core than this: to hand one to a thread costs more, as both threads want the
interpreter. Longer ones would keep requests from being read."""

PROVEN = 64
"""Batches that must have been computed by threads before: one that hangs should hang there."""


class ModelWorker:
    """Open from `start` to `retire`. preparing: requests whose images are being read or decoded; a batch is held back for them alone.

    unfit: the self-test fails since batches did; lost: it failed again.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        decoders: Callable[[float], PricedPool],
        room: Budget,
        metrics: Metrics | None,
        **waits: Any,
    ) -> None:
        """decoders, room: the threads for so many megapixels, and what they may decode at a time; metrics: count its batches, None where it
        answers nobody. waits: see `Batcher`."""
        self.engine, self.preparing, self.statistics = engine, 0, Statistics()
        self.decoders, self.room = decoders, room
        self._metrics, self._inside, self._empty = metrics, 0, asyncio.Event()
        self._pace, self._computing = 0.0, [0] * len(engine.workers)
        self.unfit = self.lost = False
        self._failed, self._examining = 0, None  # type: int, asyncio.Task[None] | None
        self._batches, self._spent = 0, 0.0  # those computed, and the seconds of a core that recent ones took
        workers = [partial(self._compute, number) for number in range(len(engine.workers))]
        self._batcher = Batcher(*workers, coming=lambda: self.preparing > 0, brief=self._brief, **waits)

    @property
    def waiting(self) -> int:
        """Images that wait for a batch."""
        return self._batcher.waiting

    def expected(self, images: int = 0) -> float:
        """Seconds until so many more images will have been computed, after those before them; a request that is being prepared counts as
        one."""
        before = sum(self._computing) + self.waiting + self.preparing
        return (before + images) * self._pace / len(self._computing)

    def start(self, pace: float) -> None:
        """On the event loop that will submit. pace: seconds that an image takes the engine; measured from then on."""
        self._pace, self._loop = pace, asyncio.get_running_loop()
        self._batcher.start()

    @contextmanager
    def coming(self) -> Iterator[None]:
        """A request's images are on their way to a batch until the block ends."""
        self.preparing += 1
        try:
            yield
        finally:
            self.preparing -= 1

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A request is on this lane: it is not taken away until the block ends."""
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def submit(self, batch: np.ndarray) -> Answered:
        """As `Batcher.submit`."""
        return await self._batcher.submit(batch)

    async def retire(self) -> None:
        """Let those that are on it come to their end, then end its threads."""
        if self._inside:
            await self._empty.wait()
        await self._batcher.stop()
        if self._examining:
            self._examining.cancel()

    def _brief(self) -> bool:
        return self._batches >= PROVEN and self._spent < BRIEF_S and self.engine.device.type == "cpu"

    def _compute(self, number: int, batch: np.ndarray) -> np.ndarray:
        if self._metrics:
            self._metrics.computed(len(batch))
        self._computing[number] = len(batch)
        began, spent = time.monotonic(), time.thread_time()
        try:
            found = self.engine.workers[number](batch)
            if not np.isfinite(found[:, 0]).all():
                raise ValueError("the network's answers are no numbers")
        except Exception:
            self._failed += 1
            if self._failed >= FAILURES:
                self._loop.call_soon_threadsafe(self._examine_once)
            raise
        finally:
            self._computing[number] = 0
        self._failed = 0
        # Several threads may do this at a time: that a measurement is lost then does no harm. A large batch, which tells more of how fast
        # it goes when there is much to do, counts as so many images.
        share, seconds = 1 - (1 - RECENT) ** len(batch), time.monotonic() - began
        self.statistics.computed(len(batch), seconds)
        self._pace += share * (seconds / len(batch) - self._pace)
        self._batches += 1
        self._spent += max(RECENT, 1 / self._batches) * (time.thread_time() - spent - self._spent)
        return found

    def _examine_once(self) -> None:
        if self._examining is None:
            self._examining = asyncio.create_task(self._examine())

    async def _examine(self) -> None:
        """Until the engine passes its self-test."""
        while why := await self._failure():
            self.unfit, self.lost = True, self.unfit
            logger.error("the model in use fails its self-test: %s", why)
            await asyncio.sleep(AGAIN_S)
        self.unfit = self.lost = False
        self._failed, self._examining = 0, None

    async def _failure(self) -> Exception | None:
        try:
            await asyncio.to_thread(self.engine.self_test)
        except Exception as err:  # of the device as well
            return err
        return None
