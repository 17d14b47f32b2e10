"""The lab: textbook claims, each tested by a small seeded experiment with Refract's own layers and losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Outcome:
    """The result of an experiment.

    holds: whether it confirms the claim; summary: the measurements as a sentence; curves: name → values, for a plot; x, y: axis labels;
    log: whether the y axis is logarithmic.
    """

    holds: bool
    summary: str
    curves: Mapping[str, list[float]] = field(default_factory=dict)
    x: str = ""
    y: str = ""
    log: bool = False


@dataclass(frozen=True)
class Experiment:
    """claim: a sentence; run: seed → Outcome, in less than a minute on two cores."""

    claim: str
    run: Callable[[int], Outcome]


def experiments() -> Mapping[str, Experiment]:
    """Return name → experiment, in the order of the output."""
    from refract.pipeline.lab.learning import LEARNING
    from refract.pipeline.lab.signals import SIGNALS

    return MappingProxyType({**SIGNALS, **LEARNING})
