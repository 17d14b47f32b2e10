"""Choose, on validation images, the probability threshold from which a multi-label classifier predicts each label."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

LOWEST, HIGHEST = 1e-4, 1 - 1e-4
"""Bounds of the thresholds. At 0 every image would get the label, at 1 no image."""

BORROWED = 5.0
"""Weight of the pooled counts of all labels, in positives, that are added to a label's own counts."""

Aim = Literal["f1", "precision", "recall", "fixed"]


@dataclass(frozen=True)
class Thresholds:
    """values: one per label, exact in float32; missed: indices of labels with positives that reach the target at no threshold."""

    values: tuple[float, ...]
    missed: tuple[int, ...] = ()


def choose_thresholds(probabilities: np.ndarray, truth: np.ndarray, *, aim: Aim, target: float) -> Thresholds:
    """Choose one threshold per label. A label is predicted if its probability reaches the threshold.

    probabilities: (N, C); truth: (N, C) bool; target: wanted precision or recall, in (0, 1], not used for f1. The aim f1 takes the highest
    F1; precision the highest recall at a precision of at least `target`; recall the highest precision at a recall of at least `target`;
    fixed takes 0.5.

    The threshold of a label with few positives is mostly chance. Therefore the pooled counts of all labels, scaled to BORROWED positives,
    are added to the label's own counts. A label without positives gets about the threshold of all labels. A threshold is accepted only if
    the label's own F1 is at least that at 0.5, or if its own precision or recall reaches the target, if any threshold does.
    Candidates lie halfway between neighbouring probabilities. Two more candidates are 0.5 and the threshold of the pooled labels. No other
    candidate gives the label to every image.
    """
    count = truth.shape[1]
    if aim == "fixed" or not len(truth):
        return Thresholds((0.5,) * count)
    probabilities = probabilities.astype(np.float32)
    everything = _Ranked(probabilities.ravel(), truth.ravel())
    pooled_cuts = _cuts(probabilities.ravel(), 0.5)
    pooled_counts = everything.counts(pooled_cuts)
    pooled = float(pooled_cuts[_best(pooled_cuts, pooled_counts, pooled_counts, aim, target)])
    weight = BORROWED / max(1, truth.sum())
    values, missed = [], []
    for column in range(count):
        cuts = _cuts(probabilities[:, column], 0.5, pooled)
        label_counts = _Ranked(probabilities[:, column], truth[:, column]).counts(cuts)
        best = _best(cuts, label_counts, label_counts.plus(everything.counts(cuts), weight), aim, target)
        values.append(float(cuts[best]))
        if aim != "f1" and label_counts.present and label_counts.rate(aim)[best] < target:
            missed.append(column)
    return Thresholds(tuple(values), tuple(missed))


@dataclass(frozen=True)
class _Counts:
    """Counts for each threshold. hits: (K,) true positives; given: (K,) predicted positives; present: number of positives."""

    hits: np.ndarray
    given: np.ndarray
    present: float

    def plus(self, other: "_Counts", weight: float) -> "_Counts":
        return _Counts(
            self.hits + weight * other.hits, self.given + weight * other.given, self.present + weight * other.present
        )

    def rate(self, aim: Aim) -> np.ndarray:
        """Return F1, precision or recall, 0 where it is undefined, as in scikit-learn."""
        if aim == "f1":
            return 2 * self.hits / np.maximum(self.given + self.present, 1e-12)
        return self.hits / np.maximum(self.given if aim == "precision" else self.present, 1e-12)


class _Ranked:
    """The sorted probabilities of one label, with the cumulative count of its positives."""

    def __init__(self, probabilities: np.ndarray, truth: np.ndarray) -> None:
        order = np.argsort(probabilities, kind="stable")
        self._sorted = probabilities[order]
        self._below = np.concatenate([[0], np.cumsum(truth[order])])

    def counts(self, cuts: np.ndarray) -> _Counts:
        start = np.searchsorted(self._sorted, cuts, side="left")
        present = int(self._below[-1])
        return _Counts(present - self._below[start], len(self._sorted) - start, present)


def _cuts(probabilities: np.ndarray, *further: float) -> np.ndarray:
    """Return `further` and the thresholds halfway between neighbouring probabilities, as float32 (K,) in [LOWEST, HIGHEST]."""
    values = np.unique(probabilities)
    lower, upper = values[:-1], values[1:]
    middle = np.clip((lower.astype(np.float64) + upper) / 2, LOWEST, HIGHEST).astype(np.float32)
    middle = np.where(middle > lower, middle, upper)  # some float32 neighbours have no value between them
    inside = (middle > lower) & (middle <= upper) & (middle >= LOWEST) & (middle <= HIGHEST)
    return np.concatenate([np.array(further, np.float32), middle[inside]])


def _best(cuts: np.ndarray, label_counts: _Counts, joint: _Counts, aim: Aim, target: float) -> int:
    """Return the index of the chosen cut. cuts: 0.5 first; label_counts: the label's counts; joint: these plus the pooled ones."""
    own_rate, rate = label_counts.rate(aim), joint.rate(aim)
    accepted = own_rate >= (own_rate[0] if aim == "f1" else target)
    if not accepted.any():
        accepted = np.ones_like(accepted)
    if aim != "f1" and (accepted & (rate >= target)).any():
        reached = np.flatnonzero(accepted & (rate >= target))
        return int(reached[cuts[reached].argmin() if aim == "precision" else cuts[reached].argmax()])
    ties = np.flatnonzero(accepted & (rate >= rate[accepted].max()))
    if aim == "f1":  # the nearest to 0.5 of equally good ones
        return int(ties[np.abs(cuts[ties] - 0.5).argmin()])
    return int(ties[cuts[ties].argmin() if aim == "precision" else cuts[ties].argmax()])
