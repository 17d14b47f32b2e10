"""One model's way: its engine, its batcher, and the requests that are on it. Knows nothing of HTTP."""

import asyncio
import time
from collections.abc import Iterator
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
        self, engine: Engine, metrics: Metrics, *, decoders: ThreadPoolExecutor, room: Room, **waits: Any
    ) -> None:
        """decoders, room: threads for what is prepared, and what they may decode at a time. waits: see `Batcher`."""
        self.engine, self.preparing = engine, 0
        self.decoders, self.room = decoders, room
        self._metrics, self._inside, self._empty = metrics, 0, asyncio.Event()
        self._pace, self._computing = 0.0, [0] * len(engine.workers)
        workers = [partial(self._compute, number) for number in range(len(engine.workers))]
        self._batcher = Batcher(*workers, coming=lambda: self.preparing > 0, **waits)

    @property
    def waiting(self) -> int:
        """Pictures that wait for a batch."""
        return self._batcher.waiting

    def expected(self, pictures: int = 0) -> float:
        """Seconds until so many more pictures will have been computed, after those before them; a request that is being prepared counts as
        one."""
        before = sum(self._computing) + self.waiting + self.preparing
        return (before + pictures) * self._pace / len(self._computing)

    def start(self, pace: float) -> None:
        """On the event loop that will submit. pace: seconds that a picture takes the engine; measured from then on."""
        self._pace = pace
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

    def _compute(self, number: int, batch: np.ndarray) -> np.ndarray:
        self._metrics.computed(len(batch))
        self._computing[number] = len(batch)
        began = time.monotonic()
        try:
            found = self.engine.workers[number](batch)
        finally:
            self._computing[number] = 0
        # Several threads may do this at a time: that a measurement is lost then does no harm. A large batch, which tells more of how fast
        # it goes when there is much to do, counts as so many pictures.
        share = 1 - (1 - RECENT) ** len(batch)
        self._pace += share * ((time.monotonic() - began) / len(batch) - self._pace)
        return found
