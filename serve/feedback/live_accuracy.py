"""The accuracy and the calibration of judged predictions, with 95 % intervals.

It does not know which predictions were judged: the estimates hold for the traffic only if feedback is given for a random sample of it.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from refract.models.intervals import Z, wilson
from refract.serve.feedback.decisions import Scores

MOST_CLASSES = 20
"""Most classes that are reported for one model: those with the most judged predictions."""


class Estimate(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class ClassAccuracy(NamedTuple):
    """How many predictions with this true label contain it. judged: their number."""

    label: str
    judged: int
    accuracy: Estimate


class LiveAccuracy(NamedTuple):
    """The estimates of one model.

    - digest: the beginning of the bundle's digest
    - judged: number of judged predictions
    - accuracy: fraction of predictions with exactly the true labels
    - calibration: mean confidence minus accuracy; above 0 the model is overconfident. For multi-label it is compared with the fraction of
      right decisions, which is what the confidence of a multi-label prediction estimates
    - classes: at most MOST_CLASSES, in the order of the labels
    """

    digest: str
    judged: int
    accuracy: Estimate
    calibration: Estimate
    classes: tuple[ClassAccuracy, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the estimates as a JSON object."""
        classes = [{"label": row.label, "judged": row.judged, **row.accuracy._asdict()} for row in self.classes]
        estimates = {"accuracy": self.accuracy._asdict(), "calibration": self.calibration._asdict()}
        return {"digest": self.digest, "judged": self.judged, **estimates, "classes": classes}


def live_accuracy(digest: str, labels: tuple[str, ...], scores: Scores, confidence: np.ndarray) -> LiveAccuracy:
    """Estimate from at least one judged prediction. confidence: (N,)."""
    accuracy = _proportions(np.array([scores.correct.sum()]), np.array([len(scores.correct)]))[0]
    busiest = np.argsort(-scores.class_judged, kind="stable")[:MOST_CLASSES]
    shown = np.sort(busiest[scores.class_judged[busiest] > 0])
    estimates = _proportions(scores.class_hits[shown], scores.class_judged[shown])
    classes = tuple(
        ClassAccuracy(labels[index], int(scores.class_judged[index]), estimate)
        for index, estimate in zip(shown.tolist(), estimates, strict=True)
    )
    return LiveAccuracy(digest, len(confidence), accuracy, calibration(confidence, scores.right), classes)


def calibration(confidence: np.ndarray, right: np.ndarray) -> Estimate:
    """Estimate the mean of `confidence` (N,) minus that of `right` (N,), both in 0…1.

    The interval is that of the mean of the differences by the normal approximation, after two right and two wrong predictions of mean
    confidence were added. So it has a width if every prediction is right. Source: Agresti & Coull 1998, "Approximate is better than 'exact'
    for interval estimation of binomial proportions". Deviation: the interval of a difference, in place of a proportion. It contains the
    estimate.
    """
    differences = confidence.astype(np.float64) - right
    value, mean = float(differences.mean()), float(confidence.mean(dtype=np.float64))
    padded = np.concatenate([differences, [mean - 1, mean - 1, mean, mean]])
    centre, spread = float(padded.mean()), Z * float(padded.std()) / math.sqrt(len(padded))
    return Estimate(value, max(-1.0, min(value, centre - spread)), min(1.0, max(value, centre + spread)))


def _proportions(hits: np.ndarray, trials: np.ndarray) -> list[Estimate]:
    rows = zip((hits / trials).tolist(), wilson(hits, trials).tolist(), strict=True)
    return [Estimate(value, low, high) for value, (low, high) in rows]
