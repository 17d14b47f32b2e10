"""The models of one server: the champion, the engine before it, and the challenger. They are swapped while requests are in flight."""

import asyncio
import logging
import math
from pathlib import Path

from refract import progress
from refract.models.bundle.bundle import BundleError
from refract.serve.errors import NotReadyError, RequestError
from refract.serve.metrics import Metrics
from refract.serve.requests.limits import Budget, Limits
from refract.serve.rollout.canary import Challenge, Challenger
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.model_worker import ModelWorker
from refract.serve.runtime.pools import DecoderPools
from refract.serve.runtime.settings import ServiceSettings

logger = logging.getLogger(__name__)


class ServedModels:
    """Holds a started model worker for each model between `start` and `stop`. Use it on one event loop only.

    champion: the worker that answers; challenger: the canary or shadow model, if any; previous: the engine to which `roll_back` returns.
    ready: whether the self-test has passed and `stop` was not called. rejected: folders of bundles that failed to load or to pass the
    self-test. rolled_back_from: the folder of the bundle that an operator rolled back, until its registry name refers to another version.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        settings: ServiceSettings,
        limits: Limits,
        metrics: Metrics,
        decoders: DecoderPools,
        shadow_decoders: DecoderPools,
    ) -> None:
        self._settings, self._limits, self._metrics = settings, limits, metrics
        self._decoders, self._shadow_decoders, self._budget = decoders, shadow_decoders, Budget(limits)
        self.champion = self._new_worker(engine)
        self.challenger: Challenger | None = None
        self.previous: Engine | None = None
        self.ready = False
        self.rejected: set[Path] = set()
        self.rolled_back_from: Path | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._swapping = asyncio.Lock()

    @property
    def engine(self) -> Engine:
        """The engine that answers new requests."""
        return self.champion.engine

    async def start(self) -> None:
        """Run the self-test. BundleError if a prediction differs from the stored one of its golden sample, or if predictions are to abstain
        below a familiarity and the bundle has no training features."""
        self._check_familiarity(self.engine)
        progress.stage("testing the model on its golden samples")
        pace = await asyncio.to_thread(self.engine.self_test)
        self.champion.start(pace)
        self._metrics.serves(self.engine.bundle)
        self.ready = True

    async def stop(self) -> None:
        """Answer the accepted requests, and stop the threads of all models."""
        self.ready = False
        workers = [self.champion, self.challenger.worker] if self.challenger else [self.champion]
        await asyncio.gather(*(worker.retire() for worker in workers), *self._retiring)

    def check_ready(self) -> None:
        """Raise NotReadyError outside of `start` … `stop`."""
        if not self.ready:
            raise NotReadyError("the self-test has not passed yet, or the server is shutting down")

    def check_fit(self) -> None:
        """Raise NotReadyError outside of `start` … `stop`, or while the champion fails its self-test."""
        self.check_ready()
        if self.champion.unfit:
            raise NotReadyError("the model fails its self-test")

    def check_alive(self) -> None:
        """Raise NotReadyError if only a restart may help: the self-test failed twice in a row."""
        if self.champion.lost:
            raise NotReadyError("the model failed its self-test twice in a row; restart the server")

    async def swap(self, engine: Engine) -> None:
        """Run the self-test of `engine`, then answer new requests with it. Requests in flight finish on the previous engine, which stays
        available for `roll_back`. BundleError if the self-test fails, or if the task, the labels or the inputs differ."""
        async with self._swapping:
            await self._swap(engine)

    async def roll_back(self) -> None:
        """Swap back to the previous engine, and ignore the rolled-back version while the registry name refers to it. RequestError 409 if
        there is no previous engine, or if its self-test fails."""
        async with self._swapping:
            if self.previous is None:
                raise RequestError(409, "no_model_before", "this server has no previous model to roll back to")
            rejected = self.engine.bundle.path
            try:
                await self._swap(self.previous)
            except BundleError as err:
                raise RequestError(409, "model_before_fails", "the previous model fails its self-test") from err
            self.rolled_back_from = rejected
            logger.info("rolled back to %s", self.engine.bundle.path.name)

    async def challenge(self, challenge: Challenge) -> None:
        """Make the engine of `challenge` the challenger, in place of the previous one. BundleError as in `swap`."""
        assert challenge.engine is not None
        async with self._swapping:
            worker = await self._start_worker(challenge.engine, shadow=not challenge.answers)
            previous, self.challenger = self.challenger, Challenger(worker, challenge)
            self._metrics.challenges(challenge.engine.bundle)
            if previous:
                self._retire(previous.worker)

    async def _swap(self, engine: Engine) -> None:
        worker, previous = await self._start_worker(engine), self.champion
        self.champion, self.previous = worker, previous.engine
        self._metrics.serves(engine.bundle)
        self._metrics.swapped("done")
        self._retire(previous)

    async def _start_worker(self, engine: Engine, *, shadow: bool = False) -> ModelWorker:
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
        self._check_familiarity(engine)
        pace = await asyncio.to_thread(engine.self_test)
        self.check_ready()
        worker = self._new_shadow(engine) if shadow else self._new_worker(engine)
        worker.start(pace)
        return worker

    def _check_familiarity(self, engine: Engine) -> None:
        limit = self._settings.min_familiarity
        if limit is None:
            return
        if engine.familiarity is None:
            raise BundleError(
                f"{engine.bundle.path}: has no training features, which --min-familiarity needs; train again, or omit the option"
            )
        if (usual := engine.familiarity.usual_below(limit)) > 2 * limit:
            logger.warning(
                "--min-familiarity %g: about %.0f%% of usual images will abstain, because %s has only %d validation images; "
                "train with %d or more",
                limit, 100 * usual, engine.bundle.path, len(engine.familiarity.training.validation), math.ceil(1 / limit) - 1,
            )  # fmt: skip

    def _new_worker(self, engine: Engine) -> ModelWorker:
        return ModelWorker(
            engine, settings=self._settings, decoders=self._decoders, budget=self._budget, metrics=self._metrics
        )

    def _new_shadow(self, engine: Engine) -> ModelWorker:
        """A worker with its own decoding thread and budget, so that it does not delay other requests. Its batches are not counted."""
        return ModelWorker(
            engine,
            settings=self._settings,
            decoders=self._shadow_decoders,
            budget=Budget(self._limits),
            metrics=None,
        )

    def _retire(self, worker: ModelWorker) -> None:
        task = asyncio.create_task(worker.retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
