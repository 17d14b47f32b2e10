"""Predict requests again with a shadow, after their responses, and count how often it agrees."""

import asyncio
import logging

import numpy as np

from refract.serve.errors import RequestError
from refract.serve.metrics import Metrics
from refract.serve.requests.limits import OverloadedError
from refract.serve.rollout.canary import SHADOWS, Challenger
from refract.serve.runtime.batcher import BatchError, ClosedError
from refract.serve.runtime.predictor import Predictor
from refract.serve.runtime.work import ParsedWork, Predictions

logger = logging.getLogger(__name__)


class Shadows:
    """Compares at most SHADOWS requests at a time, each within `deadline_s`. Use it on one event loop only."""

    def __init__(self, predictor: Predictor, metrics: Metrics, deadline_s: float) -> None:
        self._predictor, self._metrics, self._deadline = predictor, metrics, deadline_s
        self._tasks: set[asyncio.Task[None]] = set()

    def offer(self, challenger: Challenger, parsed: ParsedWork, champion: Predictions) -> None:
        """Predict the request with the challenger, and compare with the champion's predictions. It does not wait."""
        if len(self._tasks) >= SHADOWS:
            self._metrics.challenged("skipped", len(champion.probabilities))
            return
        task = asyncio.create_task(self._compare(challenger, parsed, champion.probabilities))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Cancel the comparisons that are not complete."""
        for task in self._tasks:
            task.cancel()

    async def _compare(self, challenger: Challenger, parsed: ParsedWork, champion: np.ndarray) -> None:
        parsed = parsed._replace(work=parsed.work._replace(explained=False))
        try:
            async with asyncio.timeout(self._deadline):
                predictions = await self._predictor.answer(challenger.worker, parsed, sampled=False)
        except Exception as err:
            count_failure(self._metrics, err, len(champion))
            return
        agreed = int((predictions.probabilities.argmax(axis=1) == champion.argmax(axis=1)).sum())
        seconds = sum(predictions.seconds.values())
        self._metrics.challenged("agreed", agreed, seconds)
        self._metrics.challenged("differed", len(champion) - agreed)


def count_failure(metrics: Metrics, err: Exception, images: int) -> None:
    """Count images that a challenger failed to predict. An unexpected error is logged."""
    metrics.challenged("failed", images)
    if not isinstance(err, (RequestError, OverloadedError, ClosedError, BatchError, TimeoutError)):
        logger.error("the challenger failed with an unexpected error", exc_info=err)
