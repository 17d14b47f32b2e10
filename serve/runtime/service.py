"""Turn a request's bytes into probabilities: admit it, choose the models that predict it, and keep its deadline."""

import asyncio
from contextlib import AbstractContextManager

from refract.cores import cores
from refract.serve.errors import NotReadyError, RequestError
from refract.serve.feedback.recent_predictions import RecentPredictions
from refract.serve.metrics import Metrics
from refract.serve.requests.limits import MIB, Limits
from refract.serve.requests.model_name import check_version
from refract.serve.rollout.canary import Challenger
from refract.serve.rollout.data_capture import DataCapture
from refract.serve.runtime.admission import Admission
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.pools import DECODING, DecoderPools, PricedPool
from refract.serve.runtime.predictor import Predictor
from refract.serve.runtime.response_cache import ResponseCache
from refract.serve.runtime.served_models import ServedModels
from refract.serve.runtime.settings import ServiceSettings
from refract.serve.runtime.shadows import Shadows, count_failure
from refract.serve.runtime.work import ParsedWork, Predictions, Work

CANARY = 0.3
"""The fraction of the deadline that a canary may use. The rest lets the champion answer in its place."""

EXPLAINED = 0.9
"""The fraction of the deadline by which heat maps must be complete. Later maps are dropped, so that the response is sent in time."""


class Service:
    """Answers requests between `start` and `stop`. A hot swap of `models` loses no request. Use it on one event loop only.

    models: the champion and the challenger; admission: the requests in flight; recent: the predictions that feedback can judge, None if
    `settings.feedback_keep` is 0; cache: the outputs of repeated requests, None if `settings.cache_mb` is 0. ValueError if
    `settings.max_queue` is less than twice `limits.max_images`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        limits: Limits,
        metrics: Metrics,
        settings: ServiceSettings | None = None,
        sampling: DataCapture | None = None,
    ) -> None:
        settings = settings or ServiceSettings()
        if settings.max_queue < 2 * limits.max_images:
            raise ValueError(
                f"max_queue={settings.max_queue} must be at least {2 * limits.max_images}, "
                f"twice max_images={limits.max_images}"
            )
        self.limits, self.metrics = limits, metrics
        self._deadline, self._sampling, self._draining = settings.deadline_s, sampling, False
        self.min_familiarity, self.shows_similar = settings.min_familiarity, settings.similar
        self.recent: RecentPredictions | None = None
        if settings.feedback_keep:
            self.recent = RecentPredictions(
                engine.bundle.info, keep=settings.feedback_keep, hours=settings.feedback_hours
            )
        self._decoders = DecoderPools(
            PricedPool(cores(), "decode", pace=DECODING),
            PricedPool(max(1, cores() // 2), "decode-large", pace=DECODING),
        )
        shadow_pool = PricedPool(1, "decode-shadow", pace=DECODING)
        self._shadow_decoders = DecoderPools(shadow_pool, shadow_pool)
        self.models = ServedModels(
            engine,
            settings=settings,
            limits=limits,
            metrics=metrics,
            decoders=self._decoders,
            shadow_decoders=self._shadow_decoders,
        )
        self.admission = Admission(settings.max_requests, settings.deadline_s)
        self.cache = ResponseCache(int(settings.cache_mb * MIB)) if settings.cache_mb else None
        self._predictor = Predictor(limits, self.admission, sampling, self.cache, metrics)
        self._shadows = Shadows(self._predictor, metrics, settings.deadline_s)

    async def start(self) -> None:
        """Run the self-test, then accept requests. BundleError if a prediction differs from the stored one of its golden sample."""
        await self.models.start()
        if self._sampling:
            self._sampling.start()

    async def stop(self) -> None:
        """Accept no more requests, answer the accepted ones, and stop all threads."""
        if self.models.ready:
            self._shadows.cancel()
            await self.models.stop()
            if self._sampling:
                await asyncio.to_thread(self._sampling.stop)
        self._predictor.close()
        self._decoders.close()
        self._shadow_decoders.close()

    def start_draining(self) -> None:
        """Report not ready to load balancers. Requests that still arrive are answered."""
        self._draining = True

    def check_accepting(self) -> None:
        """Raise NotReadyError if a load balancer should send no requests."""
        self.models.check_fit()
        if self._draining:
            raise NotReadyError("the server is shutting down")

    @property
    def accepting(self) -> bool:
        """Whether a load balancer should send requests."""
        try:
            self.check_accepting()
        except NotReadyError:
            return False
        return True

    def admitted(self) -> AbstractContextManager[None]:
        """Hold an admission slot until the block ends; enter it before the body is read. NotReadyError outside of `start` … `stop`, or
        while the engine fails its self-test. OverloadedError if all slots are taken, or if the expected wait is too long."""
        self.models.check_fit()
        return self.admission.slot(self.models.champion.expected())

    async def predict(self, work: Work) -> Predictions:
        """Parse, decode and predict one request. RequestError; 504 after the deadline, and the remaining work is cancelled.
        OverloadedError, ClosedError or BatchError."""
        champion = self.models.champion
        self.admission.check_wait(champion.expected())  # again: other bodies may have arrived since the admission
        try:
            async with asyncio.timeout(self._deadline):
                due = asyncio.get_running_loop().time() + EXPLAINED * self._deadline
                parsed = await self._predictor.parse(champion, work, due)
                if not work.explained:
                    return await self._predict(parsed)
                with self._predictor.explaining(parsed.request.images.number):
                    return await self._predict(parsed)
        except TimeoutError as err:
            raise RequestError(
                504, "deadline_exceeded", f"the request was not answered within {self._deadline:g} s"
            ) from err

    async def _predict(self, parsed: ParsedWork) -> Predictions:
        """Predict with a canary, or else with the champion, whose predictions a shadow is compared with."""
        challenger = self.models.challenger
        if challenger and not challenger.chosen():
            challenger = None
        version = parsed.work.version or parsed.request.version
        if version is None and challenger and challenger.challenge.answers:
            predictions = await self._canary_predictions(challenger, parsed)
            if predictions:
                return predictions
        champion = self.models.champion
        check_version(champion.engine.bundle, version)  # a swap may have happened while the body arrived
        predictions = await self._predictor.answer(champion, parsed)
        if challenger and not challenger.challenge.answers:
            self._shadows.offer(challenger, parsed, predictions)
        return predictions

    async def _canary_predictions(self, challenger: Challenger, parsed: ParsedWork) -> Predictions | None:
        """Return the predictions of a canary; None if it failed or was too slow, and the champion is to answer. RequestError for a request
        that the champion would reject too."""
        try:
            async with asyncio.timeout(CANARY * self._deadline):
                due = asyncio.get_running_loop().time() + EXPLAINED * CANARY * self._deadline
                predictions = await self._predictor.answer(challenger.worker, parsed._replace(due=due))
        except RequestError:
            raise
        except Exception as err:  # the champion answers, whatever the error
            count_failure(self.metrics, err, parsed.request.images.number)
            return None
        self.metrics.challenged("answered", len(predictions.probabilities), sum(predictions.seconds.values()))
        return predictions
