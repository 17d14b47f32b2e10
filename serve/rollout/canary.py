"""A second model beside the one that answers: it answers a share of the requests itself (a canary), or is asked after them (a shadow)."""

import random
from dataclasses import dataclass

from refract.serve.runtime.engine import Engine
from refract.serve.runtime.model_worker import ModelWorker

SHADOWS = 8
"""Requests that are asked after at a time; what comes meanwhile is not."""


@dataclass(frozen=True)
class Challenge:
    """engine: the challenger's, None where there is none yet; share: of the requests, in 0…1; answers: whether it answers them, or only
    its agreement is counted; follow: its name in the registry, to be asked for its meaning."""

    engine: Engine | None
    share: float
    answers: bool
    follow: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"Challenge: share={self.share} is not in (0, 1]")


class Challenger:
    """A challenger at work on a lane of its own, which is open."""

    def __init__(self, lane: ModelWorker, challenge: Challenge) -> None:
        self.lane, self.challenge = lane, challenge

    def chosen(self) -> bool:
        """Whether this request is of its share; none is while its engine fails its self-test."""
        return random.random() < self.challenge.share and not self.lane.unfit
