"""The way from a request's bytes to probabilities: worker threads prepare, the batcher gathers, the engine answers."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from augment.preprocess import Preprocess
from models.bundle import Bundle, BundleError
from serve.batcher import BatchError, ClosedError
from serve.challenge import SHADOWS, Challenge, Challenger
from serve.cores import cores
from serve.engine import Engine
from serve.errors import NotReadyError, RequestError
from serve.explain import png
from serve.lane import Lane
from serve.limits import Limits, OverloadedError, Room
from serve.metrics import Metrics

logger = logging.getLogger(__name__)

PATIENCE = 0.5
"""The share of the deadline that what is taken may wait; the rest is for what a pace does not tell."""

MOST_EXPLAINED = 8
"""Heat maps in one request: each costs several times an answer."""

CANARY = 0.3
"""The share of the deadline that a canary has, so that there is time for the champion to answer in its place."""

Prepare = Callable[[Preprocess, Room], np.ndarray]
"""Makes the uint8 N×H×W×3 batch of a request, or raises RequestError."""


class Work(NamedTuple):
    """What a request asks for. prepare: makes its N pictures; mirrored: the mean answer to each and its mirror image, of their logits;
    explained: with heat maps of the likeliest labels; quick: `prepare` is better called at once than on a worker thread."""

    prepare: Prepare
    mirrored: bool = False
    explained: bool = False
    quick: bool = False


class Answers(NamedTuple):
    """bundle: that answered; probabilities: float32 N×C; seconds: of the stages `prepare` (a thread to be free, decoding, resizing),
    `queue`, `compute` and `explain`; explanations: where they were asked for, of each picture a PNG of the network's size, or None."""

    bundle: Bundle
    probabilities: np.ndarray
    seconds: dict[str, float]
    explanations: tuple[bytes | None, ...] = ()

    @property
    def timing(self) -> str:
        """The stages as a `Server-Timing` header."""
        return ", ".join(f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in self.seconds.items())


class Service:
    """One engine at a time, open for requests between `start` and `stop`; by `swap` another one, with no request lost.

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
        self.limits, self.metrics = limits, metrics
        self.ready = self._leaving = False
        self._max_requests, self._deadline = max_requests, deadline_s
        self._inside = 0
        self._waits: dict[str, Any] = {"max_batch": max_batch, "max_wait_ms": max_wait_ms, "max_queue": max_queue}
        self._workers = ThreadPoolExecutor(cores(), thread_name_prefix="prepare")
        # Heat maps, and a shadow's pictures, keep nobody from being decoded.
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="aside")
        self._place: dict[str, Any] = {"decoders": self._workers, "room": Room(limits)}
        self._lane = self._lane_of(engine)
        self._previous: Engine | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._challenger: Challenger | None = None
        self._shadows: set[asyncio.Task[None]] = set()
        self._swapping = asyncio.Lock()
        self.rejected: set[Path] = set()
        """Folders of bundles that failed, or from which a person went back."""

    @property
    def inside(self) -> int:
        """Requests that are in the house."""
        return self._inside

    @property
    def waiting(self) -> int:
        """Pictures that wait for the engine."""
        return self._lane.waiting

    @property
    def engine(self) -> Engine:
        """That of new requests."""
        return self._lane.engine

    @property
    def challenger(self) -> Challenger | None:
        """The second model, where there is one."""
        return self._challenger

    async def start(self) -> None:
        """Run the self-test, then open. BundleError if the golden pictures' answers do not come again."""
        pace = await asyncio.get_running_loop().run_in_executor(self._workers, self.engine.self_test)
        self._lane.start(pace)
        self.metrics.serves(self.engine.bundle.info.name, self.engine.bundle.digest)
        self.ready = True

    def leave(self) -> None:
        """Tell balancers to send nothing more; what comes is answered still."""
        self._leaving = True

    def check_wanted(self) -> None:
        """NotReadyError where a balancer should send nothing."""
        self.check_ready()
        if self._leaving:
            raise NotReadyError("the server is going down")

    async def stop(self) -> None:
        """Close, and answer what was accepted."""
        if self.ready:
            self.ready = False
            for shadow in self._shadows:
                shadow.cancel()
            lanes = [self._lane, self._challenger.lane] if self._challenger else [self._lane]
            await asyncio.gather(*(lane.retire() for lane in lanes), *self._retiring)
        self._workers.shutdown(wait=False)
        self._aside.shutdown(wait=False, cancel_futures=True)

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
            own = {} if challenge.answers else {"decoders": self._aside, "room": Room(self.limits)}
            lane, before = await self._opened(challenge.engine, **own), self._challenger
            self._challenger = Challenger(lane, challenge)
            self.metrics.challenges(challenge.engine.bundle.info.name, challenge.engine.bundle.digest)
            if before:
                self._retire(before.lane)

    async def _opened(self, engine: Engine, **place: Any) -> Lane:
        old, new = self.engine.bundle.info, engine.bundle.info
        if (old.task, old.labels) != (new.task, new.labels):
            raise BundleError(f"{engine.bundle.path}: answers with other labels than {old.name}; start a server for it")
        pace = await asyncio.to_thread(engine.self_test)
        self.check_ready()
        lane = self._lane_of(engine, **place)
        lane.start(pace)
        return lane

    def _retire(self, lane: Lane) -> None:
        task = asyncio.create_task(lane.retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def roll_back(self) -> None:
        """Answer with the engine before, and follow no name to the present one again. RequestError 409 where there was none."""
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
            self.rejected.add(left)
            logger.warning("went back to %s", self.engine.bundle.path.name)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place in the house, before anything is read. NotReadyError outside of `start` … `stop`, OverloadedError where it
        is full, or an answer would take too long."""
        self.check_ready()
        if self._inside >= self._max_requests:
            raise OverloadedError(f"{self._inside} requests are being answered already; try again later")
        self._check_pace(self._lane)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def _check_pace(self, lane: Lane, pictures: int = 0) -> None:
        """What could not be answered by its deadline is better not begun: else all wait, and none is answered. pictures: of it, where they
        are known."""
        expected = lane.expected(pictures)
        if expected > PATIENCE * self._deadline:
            raise OverloadedError(f"an answer would take {expected:.1f} s; try again later", round(expected) or 1)

    def _lane_of(self, engine: Engine, **place: Any) -> Lane:
        return Lane(engine, self.metrics, **self._waits, **(place or self._place))

    async def predict(self, work: Work) -> Answers:
        """The answers. RequestError, 504 beyond the deadline: what is not computed by then never is; OverloadedError, ClosedError or
        BatchError."""
        self._check_pace(self._lane)  # again, as many bodies may have arrived at once
        try:
            async with asyncio.timeout(self._deadline):
                return await self._predict(work)
        except TimeoutError as err:
            raise RequestError(504, "deadline_exceeded", f"there was no answer within {self._deadline:g} s") from err

    def check_ready(self) -> None:
        """NotReadyError outside of `start` … `stop`."""
        if not self.ready:
            raise NotReadyError("the self-test has not passed yet, or the server is going down")

    async def _predict(self, work: Work) -> Answers:
        challenger = self._challenger if self._challenger and self._challenger.chosen() else None
        if challenger and challenger.challenge.answers:
            try:
                async with asyncio.timeout(CANARY * self._deadline):
                    found = await self._on(challenger.lane, work)
            except (BatchError, ClosedError, OverloadedError, TimeoutError):  # the one that is trusted answers
                self.metrics.challenged("failed", 1)
            else:
                self.metrics.challenged("answered", len(found.probabilities), sum(found.seconds.values()))
                return found
        found = await self._on(self._lane, work)
        if challenger and not challenger.challenge.answers:
            self._shadow(challenger, work, found)
        return found

    async def _on(self, lane: Lane, work: Work) -> Answers:
        with lane.entered():  # whatever is served meanwhile
            began = time.monotonic()
            batch = await self._prepared(lane, work)
            prepared = time.monotonic() - began
            if work.explained and len(batch) > MOST_EXPLAINED:
                raise RequestError(
                    413, "too_many_images", f"{len(batch)} images to explain in one request; at most {MOST_EXPLAINED}"
                )
            inputs = np.concatenate([batch, batch[:, :, ::-1]]) if work.mirrored else batch
            if lane.waiting:
                self._check_pace(lane, len(inputs))
            found = await lane.submit(inputs)
            seconds = {"prepare": prepared, "queue": found.queued, "compute": found.computed}
            rows = lane.engine.mean(*np.split(found.outputs, 2)) if work.mirrored else found.outputs
            if not work.explained:
                return Answers(lane.engine.bundle, rows, seconds)
            began = time.monotonic()
            maps = await asyncio.get_running_loop().run_in_executor(self._aside, _explain, lane.engine, batch, rows)
            return Answers(lane.engine.bundle, rows, {**seconds, "explain": time.monotonic() - began}, maps)

    async def _prepared(self, lane: Lane, work: Work) -> np.ndarray:
        if work.quick:
            return work.prepare(lane.engine.preprocess, lane.room)
        lane.preparing += 1
        try:
            # One hop a request, not one a picture: cheaper, and a request of 64 pictures cannot take every worker.
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(lane.decoders, work.prepare, lane.engine.preprocess, lane.room)
        finally:
            lane.preparing -= 1

    def _shadow(self, challenger: Challenger, work: Work, found: Answers) -> None:
        if len(self._shadows) >= SHADOWS:
            self.metrics.challenged("skipped", len(found.probabilities))
            return
        task = asyncio.create_task(self._compare(challenger, work._replace(explained=False), found.probabilities))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _compare(self, challenger: Challenger, work: Work, wanted: np.ndarray) -> None:
        try:
            async with asyncio.timeout(self._deadline):
                found = await self._on(challenger.lane, work)
        except (RequestError, OverloadedError, ClosedError, BatchError, TimeoutError):
            self.metrics.challenged("failed", len(wanted))
            return
        agreed = int((found.probabilities.argmax(axis=1) == wanted.argmax(axis=1)).sum())
        seconds = sum(found.seconds.values())
        self.metrics.challenged("agreed", agreed, seconds)
        self.metrics.challenged("differed", len(wanted) - agreed)


def _explain(engine: Engine, batch: np.ndarray, rows: np.ndarray) -> tuple[bytes | None, ...]:
    explainer = engine.explainer
    pairs = zip(batch, rows.argmax(axis=1).tolist(), strict=True)
    return tuple(png(explainer.heat(image, label)) if explainer.available else None for image, label in pairs)
