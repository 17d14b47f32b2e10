"""The lab: claims that every course makes, each tried by a small seeded experiment with Refract's own parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Outcome:
    """holds: whether the experiment bears the claim out; found: the numbers, in a sentence; curves: name → values, for a plot; x, y: its
    axes; log: whether y is logarithmic."""

    holds: bool
    found: str
    curves: Mapping[str, list[float]] = field(default_factory=dict)
    x: str = ""
    y: str = ""
    log: bool = False


@dataclass(frozen=True)
class Experiment:
    """claim: what is said; run: seed → Outcome, in less than a minute on two cores."""

    claim: str
    run: Callable[[int], Outcome]


def experiments() -> Mapping[str, Experiment]:
    """By name, in the order in which they are told."""
    from refract.pipeline.lab.learning import LEARNING
    from refract.pipeline.lab.signals import SIGNALS

    return MappingProxyType({**SIGNALS, **LEARNING})
