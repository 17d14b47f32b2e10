"""The way from a request's bytes to probabilities: worker threads prepare, the batcher gathers, the engine answers."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from serve.batcher import Batcher, OverloadedError
from serve.engine import Engine
from serve.errors import NotReadyError
from serve.limits import Limits
from serve.prepare import prepare


class Service:
    """One engine, open for requests between `start` and `stop`.

    max_queue bounds both waits: requests whose pictures are to be decoded, and pictures that wait for the engine.
    Belongs to one event loop. ValueError if `max_queue` could never take a request of `limits.max_images`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        limits: Limits,
        max_batch: int = 32,
        max_wait_ms: float = 2.0,
        max_queue: int = 1024,
    ) -> None:
        if max_queue < limits.max_images:
            raise ValueError(f"max_queue={max_queue} is less than max_images={limits.max_images} of one request")
        self.engine = engine
        self.limits = limits
        self.ready = False
        self._max_queue = max_queue
        self._preparing = 0
        self._batcher = Batcher(engine.predict, max_batch=max_batch, max_wait_ms=max_wait_ms, max_queue=max_queue)
        self._workers = ThreadPoolExecutor(_cpus(), thread_name_prefix="prepare")

    async def start(self) -> None:
        """Run the self-test, then open. BundleError if the golden pictures' answers do not come again."""
        await asyncio.get_running_loop().run_in_executor(self._workers, self.engine.self_test)
        self._batcher.start()
        self.ready = True

    async def stop(self) -> None:
        """Close, and answer what was accepted."""
        if self.ready:
            self.ready = False
            await self._batcher.stop()
        self._workers.shutdown(wait=False)

    async def predict(self, content_type: str, body: bytes) -> np.ndarray:
        """The N×C probabilities of the N pictures in `body`. RequestError, OverloadedError or BatchError."""
        batch = await self._prepared(content_type, body)
        return await self._batcher.submit(batch)

    async def _prepared(self, content_type: str, body: bytes) -> np.ndarray:
        if self._preparing >= self._max_queue:
            raise OverloadedError(f"{self._preparing} requests are waiting already; try again later")
        self._preparing += 1
        try:
            # One hop a request, not one a picture: cheaper, and a request of 64 pictures cannot take every worker.
            loop, options = asyncio.get_running_loop(), (self.engine.preprocess, self.limits)
            return await loop.run_in_executor(self._workers, prepare, content_type, body, *options)
        finally:
            self._preparing -= 1

    def check_ready(self) -> None:
        """NotReadyError outside of `start` … `stop`."""
        if not self.ready:
            raise NotReadyError("the self-test has not passed yet, or the server is going down")


def _cpus() -> int:
    """CPUs that this process may use; a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
