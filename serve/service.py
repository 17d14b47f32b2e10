"""The way from a request's bytes to probabilities: worker threads prepare, the batcher gathers, the engine answers."""

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from serve.batcher import Batcher, OverloadedError
from serve.engine import Engine
from serve.errors import NotReadyError, RequestError
from serve.explain import png
from serve.limits import Limits
from serve.metrics import Metrics
from serve.prepare import prepare


@dataclass(frozen=True)
class Answers:
    """probabilities: float32 N×C; seconds: of the stages `prepare` (a thread to be free, decoding, resizing), `queue` and `compute`, and
    `explain`; explanations: where they were asked for, of each picture a PNG of the network's size, or None."""

    probabilities: np.ndarray
    seconds: dict[str, float]
    explanations: tuple[bytes | None, ...] = ()


class Service:
    """One engine, open for requests between `start` and `stop`.

    max_requests bounds the requests that are in the house, max_queue the pictures that wait for the engine, deadline_s the time from a
    request's last byte to its answer. Belongs to one event loop. ValueError if `max_queue` could never take a request of
    `limits.max_images`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        limits: Limits,
        metrics: Metrics,
        max_batch: int = 32,
        max_wait_ms: float = 2.0,
        max_queue: int = 1024,
        max_requests: int = 256,
        deadline_s: float = 10.0,
    ) -> None:
        if max_queue < 2 * limits.max_images:
            raise ValueError(
                f"max_queue={max_queue} is less than twice the max_images={limits.max_images} of one request"
            )
        if max_requests < 1 or not deadline_s > 0:
            raise ValueError(f"max_requests={max_requests} must be at least 1, deadline_s={deadline_s} above 0")
        self.engine = engine
        self.limits, self.metrics = limits, metrics
        self.ready = False
        self._max_requests, self._deadline = max_requests, deadline_s
        self._inside = self._preparing = 0
        waits = {"max_batch": max_batch, "max_wait_ms": max_wait_ms, "max_queue": max_queue}
        # A batch is held back only for pictures that are on their way from the decoders.
        self._batcher = Batcher(self._compute, coming=lambda: self._preparing > 0, **waits)  # type: ignore[arg-type]
        self._workers = ThreadPoolExecutor(_cpus(), thread_name_prefix="prepare")

    @property
    def inside(self) -> int:
        """Requests that are in the house."""
        return self._inside

    @property
    def waiting(self) -> int:
        """Pictures that wait for the engine."""
        return self._batcher.waiting

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

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place in the house, before anything is read. NotReadyError outside of `start` … `stop`, OverloadedError where it is full."""
        self.check_ready()
        if self._inside >= self._max_requests:
            raise OverloadedError(f"{self._inside} requests are being answered already; try again later")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def predict(
        self, content_type: str, body: bytes, *, mirrored: bool = False, explained: bool = False
    ) -> Answers:
        """The answers to the N pictures in `body`. mirrored: the mean answer to each and its mirror image, of their logits; explained: with
        heat maps of the likeliest labels.

        RequestError, 504 beyond the deadline: what is not computed by then never is; OverloadedError, ClosedError or BatchError.
        """
        try:
            async with asyncio.timeout(self._deadline):
                return await self._predict(content_type, body, mirrored, explained)
        except TimeoutError as err:
            raise RequestError(504, "deadline_exceeded", f"there was no answer within {self._deadline:g} s") from err

    def check_ready(self) -> None:
        """NotReadyError outside of `start` … `stop`."""
        if not self.ready:
            raise NotReadyError("the self-test has not passed yet, or the server is going down")

    def _compute(self, batch: np.ndarray) -> np.ndarray:
        self.metrics.computed(len(batch))
        return self.engine.predict(batch)

    async def _predict(self, content_type: str, body: bytes, mirrored: bool, explained: bool) -> Answers:
        began = time.monotonic()
        self._preparing += 1
        try:
            # One hop a request, not one a picture: cheaper, and a request of 64 pictures cannot take every worker.
            loop, options = asyncio.get_running_loop(), (self.engine.preprocess, self.limits)
            batch = await loop.run_in_executor(self._workers, prepare, content_type, body, *options)
        finally:
            self._preparing -= 1
        prepared = time.monotonic() - began
        found = await self._batcher.submit(np.concatenate([batch, batch[:, :, ::-1]]) if mirrored else batch)
        seconds = {"prepare": prepared, "queue": found.queued, "compute": found.computed}
        rows = self.engine.mean(*np.split(found.outputs, 2)) if mirrored else found.outputs
        if not explained:
            return Answers(rows, seconds)
        began = time.monotonic()
        maps = await loop.run_in_executor(self._workers, self._explain, batch, rows)
        return Answers(rows, {**seconds, "explain": time.monotonic() - began}, maps)

    def _explain(self, batch: np.ndarray, rows: np.ndarray) -> tuple[bytes | None, ...]:
        explainer = self.engine.explainer
        pairs = zip(batch, rows.argmax(axis=1).tolist(), strict=True)
        return tuple(png(explainer.heat(image, label)) if explainer.available else None for image, label in pairs)


def _cpus() -> int:
    """CPUs that this process may use; a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
