"""One served model: its engine, its batcher, and its requests in flight."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from refract.serve.metrics import Metrics
from refract.serve.requests.limits import Budget
from refract.serve.runtime.batcher import Answered, Batcher
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.engine_statistics import Statistics
from refract.serve.runtime.pools import RECENT, DecoderPools
from refract.serve.runtime.settings import ServiceSettings

logger = logging.getLogger(__name__)

FAILURES = 3
"""Consecutive failed batches after which the self-test runs again."""

AGAIN_S = 1.0
"""Seconds until a failed self-test is repeated: memory may have been short for a moment."""


BRIEF_S = 0.001
"""Seconds of CPU time below which the event loop computes a batch itself. To pass it to a thread costs more, as both threads need the
interpreter lock. A longer batch would delay the reading of requests."""

PROVEN = 64
"""Batches that threads compute before the event loop may compute any: a network that hangs should hang in a thread."""


class ModelWorker:
    """Computes the requests of one model between `start` and `retire`.

    preparing: number of requests whose images are being parsed or decoded; the batcher waits for them only.
    unfit: the self-test failed after failed batches; lost: it failed twice in a row.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        settings: ServiceSettings,
        decoders: DecoderPools,
        budget: Budget,
        metrics: Metrics | None,
    ) -> None:
        """decoders: the threads that decode its images; budget: the pixels that may be decoded at a time; metrics: counts the batches, None
        for a shadow."""
        self.engine, self.preparing, self.statistics = engine, 0, Statistics()
        self.decoders, self.budget = decoders, budget
        self._metrics, self._in_flight, self._idle = metrics, 0, asyncio.Event()
        self._pace, self._computing = 0.0, [0] * len(engine.workers)
        self.unfit = self.lost = False
        self._failed_batches, self._self_test_task = 0, None  # type: int, asyncio.Task[None] | None
        self._batches, self._cpu_seconds = 0, 0.0  # computed batches; moving average of a batch's CPU seconds
        compute = [partial(self._compute, number) for number in range(len(engine.workers))]
        self._batcher = Batcher(
            *compute,
            max_batch=settings.max_batch,
            max_wait_ms=settings.max_wait_ms,
            max_queue=settings.max_queue,
            coming=lambda: self.preparing > 0,
            brief=self._is_brief,
        )

    @property
    def waiting(self) -> int:
        """The number of images that wait for a batch."""
        return self._batcher.waiting

    def expected(self, images: int = 0) -> float:
        """The expected seconds until `images` more images are computed, after those that wait. A request in preparation counts as one
        image."""
        before = sum(self._computing) + self.waiting + self.preparing
        return (before + images) * self._pace / len(self._computing)

    def start(self, pace: float) -> None:
        """Start the threads. Call it on the event loop that will submit. pace: initial estimate of the engine's seconds for an image."""
        self._pace, self._loop = pace, asyncio.get_running_loop()
        self._batcher.start()

    @contextmanager
    def preparing_request(self) -> Iterator[None]:
        """Count a request as in preparation until the block ends."""
        self.preparing += 1
        try:
            yield
        finally:
            self.preparing -= 1

    @contextmanager
    def in_flight_request(self) -> Iterator[None]:
        """Count a request as in flight until the block ends. `retire` waits for it."""
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def submit(self, batch: np.ndarray) -> Answered:
        """Compute a batch: see `Batcher.submit`."""
        return await self._batcher.submit(batch)

    async def retire(self) -> None:
        """Wait for the requests in flight, then stop the threads."""
        if self._in_flight:
            await self._idle.wait()
        await self._batcher.stop()
        if self._self_test_task:
            self._self_test_task.cancel()

    def _is_brief(self) -> bool:
        return self._batches >= PROVEN and self._cpu_seconds < BRIEF_S and self.engine.device.type == "cpu"

    def _compute(self, number: int, batch: np.ndarray) -> np.ndarray:
        if self._metrics:
            self._metrics.computed(len(batch))
        self._computing[number] = len(batch)
        start, cpu_start = time.monotonic(), time.thread_time()
        try:
            outputs = self.engine.workers[number](batch)
            if not np.isfinite(outputs["probabilities"]).all():
                raise ValueError("the network's probabilities are NaN or infinite")
        except Exception:
            self._failed_batches += 1
            if self._failed_batches >= FAILURES:
                self._loop.call_soon_threadsafe(self._start_self_test)
            raise
        finally:
            self._computing[number] = 0
        self._failed_batches = 0
        # Several threads may do this at a time; a measurement lost then does no harm. A large batch measures the pace under load better, so
        # it counts as that many images.
        weight, seconds = 1 - (1 - RECENT) ** len(batch), time.monotonic() - start
        self.statistics.computed(len(batch), seconds)
        self._pace += weight * (seconds / len(batch) - self._pace)
        self._batches += 1
        self._cpu_seconds += max(RECENT, 1 / self._batches) * (time.thread_time() - cpu_start - self._cpu_seconds)
        return outputs

    def _start_self_test(self) -> None:
        if self._self_test_task is None:
            self._self_test_task = asyncio.create_task(self._repeat_self_test())

    async def _repeat_self_test(self) -> None:
        """Repeat the self-test until the engine passes it."""
        while error := await self._self_test_error():
            self.unfit, self.lost = True, self.unfit
            logger.error("the served model fails its self-test: %s", error)
            await asyncio.sleep(AGAIN_S)
        self.unfit = self.lost = False
        self._failed_batches, self._self_test_task = 0, None

    async def _self_test_error(self) -> Exception | None:
        try:
            await asyncio.to_thread(self.engine.self_test)
        except Exception as err:  # errors of the device too
            return err
        return None
