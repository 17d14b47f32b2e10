"""An experiment of the lab, and its outcome."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


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
