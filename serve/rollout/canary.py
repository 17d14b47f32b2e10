"""A second model, compared with the champion. A canary answers a fraction of the requests. A shadow predicts them again afterwards."""

import random
from dataclasses import dataclass

from refract.serve.runtime.engine import Engine
from refract.serve.runtime.model_worker import ModelWorker

SHADOWS = 8
"""Most requests that a shadow predicts at a time. Requests that arrive meanwhile are skipped."""


@dataclass(frozen=True)
class Challenge:
    """The settings of a challenger. engine: its engine, None until it is loaded; fraction: the fraction of the requests, in (0, 1];
    answers: True for a canary, False for a shadow, whose agreement is only counted; follow: its registry name to poll, if any."""

    engine: Engine | None
    fraction: float
    answers: bool
    follow: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"Challenge: fraction={self.fraction} must be in (0, 1]")


class Challenger:
    """A running challenger, with its own started model worker."""

    def __init__(self, worker: ModelWorker, challenge: Challenge) -> None:
        self.worker, self.challenge = worker, challenge

    def chosen(self) -> bool:
        """Draw whether the challenger gets this request. False while its engine fails its self-test."""
        return random.random() < self.challenge.fraction and not self.worker.unfit
