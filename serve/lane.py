"""One model's way: its engine, its batcher, and the requests that are on it. Knows nothing of HTTP."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from serve.batcher import Answered, Batcher
from serve.engine import Engine
from serve.limits import Room
from serve.metrics import Metrics

RECENT = 0.2
"""How much a picture counts in the mean of the past ones."""


class Lane:
    """Open from `start` to `retire`. preparing: requests on it whose pictures are being decoded; a batch is held back for them alone."""

    def __init__(
        self, engine: Engine, metrics: Metrics, *, decoders: ThreadPoolExecutor, room: Room, pace: float, **waits: Any
    ) -> None:
        """decoders, room: threads for what is prepared, and what they may decode at a time; pace: seconds that a picture takes the engine,
        measured from then on. waits: see `Batcher`."""
        self.engine, self.preparing = engine, 0
        self.decoders, self.room = decoders, room
        self._pace = pace
        self._metrics, self._inside, self._empty = metrics, 0, asyncio.Event()
        workers = [partial(self._compute, worker) for worker in engine.workers]
        self._batcher = Batcher(*workers, coming=lambda: self.preparing > 0, **waits)

    @property
    def waiting(self) -> int:
        """Pictures that wait for a batch."""
        return self._batcher.waiting

    def expected(self, pictures: int = 0) -> float:
        """Seconds until what waits and so many more, or a picture of each request that is on it, will have been computed."""
        return max(self.waiting + pictures, self._inside) * self._pace / len(self.engine.workers)

    def start(self) -> None:
        """On the event loop that will submit."""
        self._batcher.start()

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

    def _compute(self, worker: Callable[[np.ndarray], np.ndarray], batch: np.ndarray) -> np.ndarray:
        self._metrics.computed(len(batch))
        began = time.monotonic()
        found = worker(batch)
        # Several threads may do this at a time: that a measurement is lost then does no harm. A large batch, which tells more of how fast
        # it goes when there is much to do, counts as so many pictures.
        share = 1 - (1 - RECENT) ** len(batch)
        self._pace += share * ((time.monotonic() - began) / len(batch) - self._pace)
        return found
