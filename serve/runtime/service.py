"""The way from a request's bytes to probabilities: worker threads prepare, the batcher gathers, the engine answers."""

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
from refract.serve.requests.multimodal_samples import cuts, joined, mirrored
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
"""The share of the deadline that what is taken may wait; the rest is for what a pace does not tell."""

MOST_EXPLAINED = 8
"""Heat maps in one request: each costs several times an answer."""

CANARY = 0.3
"""The share of the deadline that a canary has, so that there is time for the champion to answer in its place."""

READERS = 2
"""Requests at a time whose bodies are taken apart and whose headers are read: JSON of many parts takes many times its size."""

LARGE = 16.0
"""Megapixels of a request that is decoded on threads of its own kind, half as many as cores: ordinary photos do not wait for it."""

DECODING = 0.01
"""Seconds that a megapixel takes, until it was measured."""

EXPLAINED = 0.9
"""The fraction of the deadline by which heat maps must be there, so that the answer leaves in time without them."""


class Service:
    """One engine at a time, open for requests between `start` and `stop`; by `swap` another one, with no request lost.

    max_requests bounds the requests that are in the house, max_queue the images that wait for the engine, deadline_s the time from a
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
        sampling: DataCapture | None = None,
    ) -> None:
        if max_queue < 2 * limits.max_images:
            raise ValueError(
                f"max_queue={max_queue} is less than twice the max_images={limits.max_images} of one request"
            )
        if max_requests < 1 or not deadline_s > 0:
            raise ValueError(f"max_requests={max_requests} must be at least 1, deadline_s={deadline_s} above 0")
        self.limits, self.metrics = limits, metrics
        self.ready = self._leaving = False
        self._max_requests, self._deadline = max_requests, deadline_s
        self._inside = 0
        self._waits: dict[str, Any] = {"max_batch": max_batch, "max_wait_ms": max_wait_ms, "max_queue": max_queue}
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._decoders = PricedPool(cores(), "decode", pace=DECODING)
        self._large = PricedPool(max(1, cores() // 2), "decode-large", pace=DECODING)
        # Heat maps, and a shadow's images, keep nobody from being decoded.
        self._explanations = Explanations()
        self._aside = PricedPool(1, "aside", pace=DECODING)
        self._place: dict[str, Any] = {"decoders": self._decoders_of, "room": Budget(limits), "metrics": metrics}
        self._sampling = sampling
        self._lane = self._lane_of(engine)
        self._previous: Engine | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._challenger: Challenger | None = None
        self._shadows: set[asyncio.Task[None]] = set()
        self._swapping = asyncio.Lock()
        self.rejected: set[Path] = set()
        """Folders of bundles that failed."""
        self.left: Path | None = None
        """The folder of the bundle from which a person went back, until its name has meant another."""

    @property
    def inside(self) -> int:
        """Requests that are in the house."""
        return self._inside

    @property
    def waiting(self) -> int:
        """Images that wait for the engine."""
        return self._lane.waiting

    @property
    def engine(self) -> Engine:
        """That of new requests."""
        return self._lane.engine

    @property
    def statistics(self) -> Statistics:
        """What that engine has done since it was opened."""
        return self._lane.statistics

    @property
    def challenger(self) -> Challenger | None:
        """The second model, where there is one."""
        return self._challenger

    async def start(self) -> None:
        """Run the self-test, then open. BundleError if the golden images' answers do not come again."""
        pace = await asyncio.to_thread(self.engine.self_test)
        self._lane.start(pace)
        self.metrics.serves(self.engine.bundle.info.name, self.engine.bundle.digest)
        if self._sampling:
            self._sampling.start()
        self.ready = True

    def leave(self) -> None:
        """Tell balancers to send nothing more; what comes is answered still."""
        self._leaving = True

    def check_wanted(self) -> None:
        """NotReadyError where a balancer should send nothing."""
        self._check_fit()
        if self._leaving:
            raise NotReadyError("the server is going down")

    def check_alive(self) -> None:
        """NotReadyError where only another start may help."""
        if self._lane.lost:
            raise NotReadyError("the model does not pass its self-test any more")

    async def stop(self) -> None:
        """Close, and answer what was accepted."""
        if self.ready:
            self.ready = False
            for shadow in self._shadows:
                shadow.cancel()
            lanes = [self._lane, self._challenger.lane] if self._challenger else [self._lane]
            await asyncio.gather(*(lane.retire() for lane in lanes), *self._retiring)
            if self._sampling:
                await asyncio.to_thread(self._sampling.stop)
        self._readers.shutdown(wait=False, cancel_futures=True)
        for threads in (self._decoders, self._large, self._aside):
            threads.close()
        self._explanations.close()

    async def swap(self, engine: Engine) -> None:
        """Answer new requests with another engine, after its self-test; those that are under way end with the old one, which is kept for
        `roll_back`. BundleError where it does not pass, or does not answer with the same labels."""
        async with self._swapping:
            await self._swap(engine)

    async def _swap(self, engine: Engine) -> None:
        lane, before = await self._opened(engine), self._lane
        self._lane, self._previous = lane, before.engine
        self.metrics.serves(engine.bundle.info.name, engine.bundle.digest)
        self.metrics.swapped("done")
        self._retire(before)

    async def challenge(self, challenge: Challenge) -> None:
        """Have its engine challenge the one that answers, in place of the one that did. BundleError as `swap`."""
        assert challenge.engine is not None
        async with self._swapping:
            aside = {"decoders": lambda _: self._aside, "room": Budget(self.limits), "metrics": None}
            own = {} if challenge.answers else aside
            lane, before = await self._opened(challenge.engine, **own), self._challenger
            self._challenger = Challenger(lane, challenge)
            self.metrics.challenges(challenge.engine.bundle.info.name, challenge.engine.bundle.digest)
            if before:
                self._retire(before.lane)

    async def _opened(self, engine: Engine, **place: Any) -> ModelWorker:
        old, new = self.engine.bundle.info, engine.bundle.info
        if (old.task, old.labels) != (new.task, new.labels):
            raise BundleError(f"{engine.bundle.path}: answers with other labels than {old.name}; start a server for it")
        if self.engine.reads != engine.reads:
            own, others = (" and ".join(sorted(one.reads)) for one in (engine, self.engine))
            raise BundleError(f"{engine.bundle.path}: reads {own}, {old.name} {others}; start a server for it")
        pace = await asyncio.to_thread(engine.self_test)
        self.check_ready()
        lane = self._lane_of(engine, **place)
        lane.start(pace)
        return lane

    def _retire(self, lane: ModelWorker) -> None:
        task = asyncio.create_task(lane.retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def roll_back(self) -> None:
        """Answer with the engine before, and do not follow a name that goes on to mean the present one. RequestError 409 where there was
        none."""
        async with self._swapping:
            if self._previous is None:
                raise RequestError(409, "no_model_before", "this server has served no other model before")
            left = self.engine.bundle.path
            try:
                await self._swap(self._previous)
            except BundleError as err:
                raise RequestError(
                    409, "model_before_fails", "the model before does not pass its self-test now"
                ) from err
            self.left = left
            logger.info("went back to %s", self.engine.bundle.path.name)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place in the house, before anything is read. NotReadyError outside of `start` … `stop`, or where the engine fails its
        self-test since; OverloadedError where it is full, or an answer would take too long."""
        self._check_fit()
        if self._inside >= self._max_requests:
            raise OverloadedError(f"{self._inside} requests are being answered already; try again later")
        self._check_pace(self._lane)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def _check_pace(self, lane: ModelWorker, images: int = 0) -> None:
        """What could not be answered by its deadline is better not begun: else all wait, and none is answered. images: of it, where they
        are known."""
        self._check_wait(lane.expected(images))

    def _check_wait(self, expected: float) -> None:
        if expected > PATIENCE * self._deadline:
            raise OverloadedError(f"an answer would take {expected:.1f} s; try again later", round(expected) or 1)

    def _decoders_of(self, megapixels: float) -> PricedPool:
        return self._large if megapixels > LARGE else self._decoders

    def _lane_of(self, engine: Engine, **place: Any) -> ModelWorker:
        return ModelWorker(engine, **self._waits, **(place or self._place))

    async def predict(self, work: Work) -> Predictions:
        """The answers. RequestError, 504 beyond the deadline: what is not computed by then never is; OverloadedError, ClosedError or
        BatchError."""
        self._check_pace(self._lane)  # again, as many bodies may have arrived at once
        try:
            async with asyncio.timeout(self._deadline):
                due = asyncio.get_running_loop().time() + EXPLAINED * self._deadline
                known = (await self._read(work))._replace(due=due)
                if not work.explained:
                    return await self._predict(known)
                with self._explaining(known.images.number):
                    return await self._predict(known)
        except TimeoutError as err:
            raise RequestError(504, "deadline_exceeded", f"there was no answer within {self._deadline:g} s") from err

    def check_ready(self) -> None:
        """NotReadyError outside of `start` … `stop`."""
        if not self.ready:
            raise NotReadyError("the self-test has not passed yet, or the server is going down")

    def _check_fit(self) -> None:
        self.check_ready()
        if self._lane.unfit:
            raise NotReadyError("the model does not pass its self-test now")

    async def _read(self, work: Work) -> ReadWork:
        began, lane = time.monotonic(), self._lane
        try:
            if work.quick:
                return ReadWork(work, work.read(), time.monotonic() - began)
            with lane.coming():
                images = await asyncio.get_running_loop().run_in_executor(self._readers, work.read)
        except BaseException:
            lane.statistics.failed(time.monotonic() - began)
            raise
        return ReadWork(work, images, time.monotonic() - began)

    @contextmanager
    def _explaining(self, count: int) -> Iterator[None]:
        """A place for so many heat maps, before what they explain is computed. RequestError 413 or OverloadedError."""
        if count > MOST_EXPLAINED:
            message = f"{count} images to explain in one request; at most {MOST_EXPLAINED}"
            raise RequestError(413, "too_many_images", message)
        self._check_wait(self._explanations.expected(count))
        with self._explanations.promised(count):
            yield

    async def _predict(self, known: ReadWork) -> Predictions:
        work = known.work
        challenger = self._challenger if self._challenger and self._challenger.chosen() else None
        if work.version is None and challenger and challenger.challenge.answers:
            try:
                async with asyncio.timeout(CANARY * self._deadline):
                    due = asyncio.get_running_loop().time() + EXPLAINED * CANARY * self._deadline
                    found = await self._on(challenger.lane, known._replace(due=due))
            except RequestError:  # the client's mistake is the same for both
                raise
            except Exception as err:  # whatever it is, the one that is trusted answers
                self._tell_failed(err, known.images.number)
            else:
                self.metrics.challenged("answered", len(found.probabilities), sum(found.seconds.values()))
                return found
        lane = self._lane
        check_version(lane.engine.bundle, work.version)  # it may have changed while the body arrived
        found = await self._on(lane, known)
        if challenger and not challenger.challenge.answers:
            self._shadow(challenger, known, found)
        return found

    async def _on(self, lane: ModelWorker, known: ReadWork, *, sampled: bool = True) -> Predictions:
        """sampled: where the answer goes to whoever asked; a shadow's does not."""
        began, found = time.monotonic(), None
        try:
            found = await self._answers(lane, known, sampled=sampled)
            return found
        finally:
            seconds = known.seconds + time.monotonic() - began
            if sampled and found:
                lane.statistics.succeeded(known.images.number, seconds, found.seconds)
            elif sampled:
                lane.statistics.failed(seconds)

    async def _answers(self, lane: ModelWorker, known: ReadWork, *, sampled: bool) -> Predictions:
        work = known.work
        with lane.entered():  # whatever is served meanwhile
            began = time.monotonic()
            batch = await self._samples(lane, known)
            prepared = known.seconds + time.monotonic() - began
            inputs = np.concatenate([batch, mirrored(batch)]) if work.mirrored else batch
            if lane.waiting:
                self._check_pace(lane, len(inputs))
            found = await lane.submit(inputs)
            seconds = {"prepare": prepared, "queue": found.queued, "compute": found.computed}
            outputs = found.outputs
            rows = lane.engine.mean(*np.split(outputs[:, 1], 2)) if work.mirrored else outputs[:, 0]
            if self._sampling and sampled:
                self._sampling.offer(lane.engine.bundle, known.images, batch, rows)
            if not work.explained:
                return Predictions(lane.engine.bundle, rows, seconds, cut=cuts(batch))
            began = time.monotonic()
            maps = await self._explanations.of(lane.engine, batch, rows, known.due)
            return Predictions(
                lane.engine.bundle, rows, {**seconds, "explain": time.monotonic() - began}, maps, cuts(batch)
            )

    async def _samples(self, lane: ModelWorker, known: ReadWork) -> np.ndarray:
        """The images, and with the texts where they are read. RequestError 422 for what this model does not read."""
        images, tokens = known.images, lane.engine.tokens
        check_read(lane.engine, images)
        batch = await self._decoded(lane, known)
        if tokens is None:
            return batch
        make = partial(joined, batch, images.texts, images.has_image, tokens)
        return make() if not images.texts else await asyncio.get_running_loop().run_in_executor(self._readers, make)

    async def _decoded(self, lane: ModelWorker, known: ReadWork) -> np.ndarray:
        images, decode = known.images, partial(known.images.decode, lane.engine.preprocess, lane.room)
        if known.work.quick:
            return decode()
        decoders = lane.decoders(images.megapixels)
        self._check_wait(decoders.expected(images.megapixels))
        with lane.coming(), decoders.promised(images.megapixels):
            # One hop a request, not one an image: cheaper, and a request of 64 images cannot take every thread.
            return await decoders.run(images.megapixels, decode)

    def _shadow(self, challenger: Challenger, known: ReadWork, found: Predictions) -> None:
        if len(self._shadows) >= SHADOWS:
            self.metrics.challenged("skipped", len(found.probabilities))
            return
        task = asyncio.create_task(self._compare(challenger, known, found.probabilities))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _compare(self, challenger: Challenger, known: ReadWork, wanted: np.ndarray) -> None:
        known = known._replace(work=known.work._replace(explained=False))
        try:
            async with asyncio.timeout(self._deadline):
                found = await self._on(challenger.lane, known, sampled=False)
        except Exception as err:
            self._tell_failed(err, len(wanted))
            return
        agreed = int((found.probabilities.argmax(axis=1) == wanted.argmax(axis=1)).sum())
        seconds = sum(found.seconds.values())
        self.metrics.challenged("agreed", agreed, seconds)
        self.metrics.challenged("differed", len(wanted) - agreed)

    def _tell_failed(self, err: Exception, images: int) -> None:
        self.metrics.challenged("failed", images)
        if not isinstance(err, (RequestError, OverloadedError, ClosedError, BatchError, TimeoutError)):
            logger.error("the challenger failed in a way of its own", exc_info=err)
