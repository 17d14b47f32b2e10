"""Turn a request's bytes into probabilities: threads decode the images, a batcher forms batches, an engine computes them."""

import asyncio
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refract.models.bundle.bundle import BundleError
from refract.serve.http.errors import NotReadyError, RequestError
from refract.serve.http.metrics import Metrics
from refract.serve.requests.limits import Budget, Limits, OverloadedError
from refract.serve.requests.multimodal_samples import cuts, flipped, joined
from refract.serve.rollout.canary import SHADOWS, Challenge, Challenger
from refract.serve.rollout.data_capture import DataCapture
from refract.serve.runtime.batcher import BatchError, ClosedError
from refract.serve.runtime.cores import cores
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.engine_statistics import Statistics
from refract.serve.runtime.explanation import Explanations
from refract.serve.runtime.model_worker import ModelWorker
from refract.serve.runtime.pools import PricedPool
from refract.serve.runtime.work import Predictions, ReadWork, Work, check_read, check_version

logger = logging.getLogger(__name__)

PATIENCE = 0.5
"""The fraction of the deadline that an accepted request may be expected to wait. The rest covers errors of that estimate."""

MOST_EXPLAINED = 8
"""The most heat maps in one request. Each costs several times as much as a prediction."""

CANARY = 0.3
"""The fraction of the deadline that a canary may use. The rest lets the champion answer in its place."""

READERS = 2
"""Requests that are parsed at the same time. A JSON body with many values takes many times its size in memory."""

LARGE = 16.0
"""Megapixels above which a request is decoded in a separate thread pool, with half as many threads as cores. Ordinary photos do not wait
for such requests."""

DECODING = 0.01
"""Initial estimate of the seconds to decode one megapixel, until it is measured."""

EXPLAINED = 0.9
"""The fraction of the deadline by which heat maps must be complete. Later maps are dropped, so that the response is sent in time."""


class Service:
    """Answers requests with one engine between `start` and `stop`. `swap` replaces the engine and loses no request.

    max_requests: most requests in flight; max_queue: most images that wait for the engine; deadline_s: seconds from a request's last byte
    to its response. Use it on one event loop only. ValueError if `max_queue` is less than twice `limits.max_images`, if `max_requests` is
    less than 1, or if `deadline_s` is not positive.
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
        sampling: DataCapture | None = None,
    ) -> None:
        if max_queue < 2 * limits.max_images:
            raise ValueError(
                f"max_queue={max_queue} must be at least {2 * limits.max_images}, twice max_images={limits.max_images}"
            )
        if max_requests < 1 or not deadline_s > 0:
            raise ValueError(f"max_requests={max_requests} must be at least 1, deadline_s={deadline_s} above 0")
        self.limits, self.metrics = limits, metrics
        self.ready = self._draining = False
        self._max_requests, self._deadline = max_requests, deadline_s
        self._in_flight = 0
        self._batch_options: dict[str, Any] = {
            "max_batch": max_batch,
            "max_wait_ms": max_wait_ms,
            "max_queue": max_queue,
        }
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._decoders = PricedPool(cores(), "decode", pace=DECODING)
        self._large = PricedPool(max(1, cores() // 2), "decode-large", pace=DECODING)
        # Heat maps and a shadow's images have separate threads, so that they do not delay the decoding of other requests.
        self._explanations = Explanations()
        self._shadow_pool = PricedPool(1, "aside", pace=DECODING)
        self._worker_options: dict[str, Any] = {
            "decoders": self._decoders_of,
            "budget": Budget(limits),
            "metrics": metrics,
        }
        self._sampling = sampling
        self._worker = self._new_worker(engine)
        self._previous: Engine | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._challenger: Challenger | None = None
        self._shadows: set[asyncio.Task[None]] = set()
        self._swapping = asyncio.Lock()
        self.rejected: set[Path] = set()
        """Folders of bundles that failed to load or to pass the self-test."""
        self.rolled_back_from: Path | None = None
        """The folder of the bundle that an operator rolled back, until its registry name refers to another version."""

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """The number of images that wait for the engine."""
        return self._worker.waiting

    @property
    def engine(self) -> Engine:
        """The engine that answers new requests."""
        return self._worker.engine

    @property
    def statistics(self) -> Statistics:
        """The counts and durations of the current engine's requests and batches since it was started."""
        return self._worker.statistics

    @property
    def challenger(self) -> Challenger | None:
        """The canary or shadow model, if any."""
        return self._challenger

    async def start(self) -> None:
        """Run the self-test, then accept requests. BundleError if a prediction differs from the stored one of its golden sample."""
        pace = await asyncio.to_thread(self.engine.self_test)
        self._worker.start(pace)
        self.metrics.serves(self.engine.bundle.info.name, self.engine.bundle.digest)
        if self._sampling:
            self._sampling.start()
        self.ready = True

    def start_draining(self) -> None:
        """Report not ready to load balancers. Requests that still arrive are answered."""
        self._draining = True

    def check_accepting(self) -> None:
        """Raise NotReadyError if a load balancer should send no requests."""
        self._check_fit()
        if self._draining:
            raise NotReadyError("the server is shutting down")

    def check_alive(self) -> None:
        """Raise NotReadyError if only a restart may help: the self-test failed twice in a row."""
        if self._worker.lost:
            raise NotReadyError("the model failed its self-test twice in a row; restart the server")

    async def stop(self) -> None:
        """Accept no more requests, answer the accepted ones, and stop all threads."""
        if self.ready:
            self.ready = False
            for shadow in self._shadows:
                shadow.cancel()
            workers = [self._worker, self._challenger.worker] if self._challenger else [self._worker]
            await asyncio.gather(*(worker.retire() for worker in workers), *self._retiring)
            if self._sampling:
                await asyncio.to_thread(self._sampling.stop)
        self._readers.shutdown(wait=False, cancel_futures=True)
        for threads in (self._decoders, self._large, self._shadow_pool):
            threads.close()
        self._explanations.close()

    async def swap(self, engine: Engine) -> None:
        """Run the self-test of `engine`, then answer new requests with it. Requests in flight finish on the previous engine, which stays
        available for `roll_back`. BundleError if the self-test fails, or if the task, the labels or the inputs differ."""
        async with self._swapping:
            await self._swap(engine)

    async def _swap(self, engine: Engine) -> None:
        worker, previous = await self._start_worker(engine), self._worker
        self._worker, self._previous = worker, previous.engine
        self.metrics.serves(engine.bundle.info.name, engine.bundle.digest)
        self.metrics.swapped("done")
        self._retire(previous)

    async def challenge(self, challenge: Challenge) -> None:
        """Make the engine of `challenge` the challenger, in place of the previous one. BundleError as in `swap`."""
        assert challenge.engine is not None
        async with self._swapping:
            separate = {"decoders": lambda _: self._shadow_pool, "budget": Budget(self.limits), "metrics": None}
            options = {} if challenge.answers else separate
            worker, previous = await self._start_worker(challenge.engine, **options), self._challenger
            self._challenger = Challenger(worker, challenge)
            self.metrics.challenges(challenge.engine.bundle.info.name, challenge.engine.bundle.digest)
            if previous:
                self._retire(previous.worker)

    async def _start_worker(self, engine: Engine, **options: Any) -> ModelWorker:
        old, new = self.engine.bundle.info, engine.bundle.info
        if (old.task, old.labels) != (new.task, new.labels):
            raise BundleError(
                f"{engine.bundle.path}: its task or labels differ from those of {old.name}; start another server for it"
            )
        if self.engine.reads != engine.reads:
            reads, expected = (" and ".join(sorted(each.reads)) for each in (engine, self.engine))
            raise BundleError(
                f"{engine.bundle.path}: reads {reads}, but {old.name} reads {expected}; start another server for it"
            )
        pace = await asyncio.to_thread(engine.self_test)
        self.check_ready()
        worker = self._new_worker(engine, **options)
        worker.start(pace)
        return worker

    def _retire(self, worker: ModelWorker) -> None:
        task = asyncio.create_task(worker.retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def roll_back(self) -> None:
        """Swap back to the previous engine, and ignore the rolled-back version while the registry name refers to it. RequestError 409 if
        there is no previous engine, or if its self-test fails."""
        async with self._swapping:
            if self._previous is None:
                raise RequestError(409, "no_model_before", "this server has no previous model to roll back to")
            rejected = self.engine.bundle.path
            try:
                await self._swap(self._previous)
            except BundleError as err:
                raise RequestError(409, "model_before_fails", "the previous model fails its self-test") from err
            self.rolled_back_from = rejected
            logger.info("rolled back to %s", self.engine.bundle.path.name)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold an admission slot until the block ends; enter it before the body is read. NotReadyError outside of `start` … `stop`, or
        while the engine fails its self-test. OverloadedError if all slots are taken, or if the expected wait is too long."""
        self._check_fit()
        if self._in_flight >= self._max_requests:
            raise OverloadedError(f"{self._in_flight} requests are in flight, the most allowed; try again later")
        self._check_pace(self._worker)
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def _check_pace(self, worker: ModelWorker, images: int = 0) -> None:
        """Raise OverloadedError if a request of `images` images would miss its deadline. To start it would delay the others too. images: 0
        if the number is not known yet."""
        self._check_wait(worker.expected(images))

    def _check_wait(self, expected: float) -> None:
        if expected > PATIENCE * self._deadline:
            raise OverloadedError(
                f"the response would take about {expected:.1f} s; try again later", round(expected) or 1
            )

    def _decoders_of(self, megapixels: float) -> PricedPool:
        return self._large if megapixels > LARGE else self._decoders

    def _new_worker(self, engine: Engine, **options: Any) -> ModelWorker:
        return ModelWorker(engine, **self._batch_options, **(options or self._worker_options))

    async def predict(self, work: Work) -> Predictions:
        """Read, decode and predict one request. RequestError; 504 after the deadline, and the remaining work is cancelled. OverloadedError,
        ClosedError or BatchError."""
        self._check_pace(self._worker)  # again: other bodies may have arrived since the admission
        try:
            async with asyncio.timeout(self._deadline):
                due = asyncio.get_running_loop().time() + EXPLAINED * self._deadline
                read_work = (await self._read(work))._replace(due=due)
                if not work.explained:
                    return await self._predict(read_work)
                with self._explaining(read_work.images.number):
                    return await self._predict(read_work)
        except TimeoutError as err:
            raise RequestError(
                504, "deadline_exceeded", f"the request was not answered within {self._deadline:g} s"
            ) from err

    def check_ready(self) -> None:
        """Raise NotReadyError outside of `start` … `stop`."""
        if not self.ready:
            raise NotReadyError("the self-test has not passed yet, or the server is shutting down")

    def _check_fit(self) -> None:
        self.check_ready()
        if self._worker.unfit:
            raise NotReadyError("the model fails its self-test")

    async def _read(self, work: Work) -> ReadWork:
        start, worker = time.monotonic(), self._worker
        try:
            if work.quick:
                return ReadWork(work, work.read(), time.monotonic() - start)
            with worker.preparing_request():
                images = await asyncio.get_running_loop().run_in_executor(self._readers, work.read)
        except BaseException:
            worker.statistics.failed(time.monotonic() - start)
            raise
        return ReadWork(work, images, time.monotonic() - start)

    @contextmanager
    def _explaining(self, count: int) -> Iterator[None]:
        """Reserve the time for `count` heat maps, before the predictions are computed. RequestError 413 or OverloadedError."""
        if count > MOST_EXPLAINED:
            message = f"the request asks for {count} heat maps; at most {MOST_EXPLAINED} are allowed"
            raise RequestError(413, "too_many_images", message)
        self._check_wait(self._explanations.expected(count))
        with self._explanations.reserved(count):
            yield

    async def _predict(self, read_work: ReadWork) -> Predictions:
        work = read_work.work
        challenger = self._challenger if self._challenger and self._challenger.chosen() else None
        if work.version is None and challenger and challenger.challenge.answers:
            try:
                async with asyncio.timeout(CANARY * self._deadline):
                    due = asyncio.get_running_loop().time() + EXPLAINED * CANARY * self._deadline
                    predictions = await self._answer(challenger.worker, read_work._replace(due=due))
            except RequestError:  # the champion would reject this request too
                raise
            except Exception as err:  # the champion answers, whatever the error
                self._count_failure(err, read_work.images.number)
            else:
                self.metrics.challenged("answered", len(predictions.probabilities), sum(predictions.seconds.values()))
                return predictions
        worker = self._worker
        check_version(worker.engine.bundle, work.version)  # a swap may have happened while the body arrived
        predictions = await self._answer(worker, read_work)
        if challenger and not challenger.challenge.answers:
            self._shadow(challenger, read_work, predictions)
        return predictions

    async def _answer(self, worker: ModelWorker, read_work: ReadWork, *, sampled: bool = True) -> Predictions:
        """Predict, and count the request in the worker's statistics. sampled: whether the client receives the predictions; False for a
        shadow's, which are neither counted nor captured."""
        start, predictions = time.monotonic(), None
        try:
            predictions = await self._compute(worker, read_work, sampled=sampled)
            return predictions
        finally:
            seconds = read_work.seconds + time.monotonic() - start
            if sampled and predictions:
                worker.statistics.succeeded(read_work.images.number, seconds, predictions.seconds)
            elif sampled:
                worker.statistics.failed(seconds)

    async def _compute(self, worker: ModelWorker, read_work: ReadWork, *, sampled: bool) -> Predictions:
        work = read_work.work
        with worker.in_flight_request():  # the worker stays open, even if a swap happens meanwhile
            start = time.monotonic()
            batch = await self._samples(worker, read_work)
            prepared = read_work.seconds + time.monotonic() - start
            inputs = np.concatenate([batch, flipped(batch)]) if work.flipped else batch
            if worker.waiting:
                self._check_pace(worker, len(inputs))
            outputs, queued, computed = await worker.submit(inputs)
            seconds = {"prepare": prepared, "queue": queued, "compute": computed}
            rows = worker.engine.mean(*np.split(outputs[:, 1], 2)) if work.flipped else outputs[:, 0]
            if self._sampling and sampled:
                self._sampling.offer(worker.engine.bundle, read_work.images, batch, rows)
            if not work.explained:
                return Predictions(worker.engine.bundle, rows, seconds, cut=cuts(batch))
            start = time.monotonic()
            maps = await self._explanations.of(worker.engine, batch, rows, read_work.due)
            return Predictions(
                worker.engine.bundle, rows, {**seconds, "explain": time.monotonic() - start}, maps, cuts(batch)
            )

    async def _samples(self, worker: ModelWorker, read_work: ReadWork) -> np.ndarray:
        """Build the model's inputs from the images, and from the texts if it reads them. RequestError 422 for an input it does not read."""
        images, tokens = read_work.images, worker.engine.tokens
        check_read(worker.engine, images)
        batch = await self._decoded(worker, read_work)
        if tokens is None:
            return batch
        join = partial(joined, batch, images.texts, images.has_image, tokens)
        return join() if not images.texts else await asyncio.get_running_loop().run_in_executor(self._readers, join)

    async def _decoded(self, worker: ModelWorker, read_work: ReadWork) -> np.ndarray:
        images, decode = read_work.images, partial(read_work.images.decode, worker.engine.preprocess, worker.budget)
        if read_work.work.quick:
            return decode()
        decoders = worker.decoders(images.megapixels)
        self._check_wait(decoders.expected(images.megapixels))
        with worker.preparing_request(), decoders.reserved(images.megapixels):
            # One task a request, not one an image: it is cheaper, and a request of 64 images cannot occupy every thread.
            return await decoders.run(images.megapixels, decode)

    def _shadow(self, challenger: Challenger, read_work: ReadWork, champion: Predictions) -> None:
        if len(self._shadows) >= SHADOWS:
            self.metrics.challenged("skipped", len(champion.probabilities))
            return
        task = asyncio.create_task(self._compare(challenger, read_work, champion.probabilities))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _compare(self, challenger: Challenger, read_work: ReadWork, champion: np.ndarray) -> None:
        read_work = read_work._replace(work=read_work.work._replace(explained=False))
        try:
            async with asyncio.timeout(self._deadline):
                predictions = await self._answer(challenger.worker, read_work, sampled=False)
        except Exception as err:
            self._count_failure(err, len(champion))
            return
        agreed = int((predictions.probabilities.argmax(axis=1) == champion.argmax(axis=1)).sum())
        seconds = sum(predictions.seconds.values())
        self.metrics.challenged("agreed", agreed, seconds)
        self.metrics.challenged("differed", len(champion) - agreed)

    def _count_failure(self, err: Exception, images: int) -> None:
        self.metrics.challenged("failed", images)
        if not isinstance(err, (RequestError, OverloadedError, ClosedError, BatchError, TimeoutError)):
            logger.error("the challenger failed with an unexpected error", exc_info=err)
