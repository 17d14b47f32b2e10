"""Measure multi-label predictions, where each image has a set of true labels and a set of predicted ones.

predicted, truth: (N, C) bool.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refract.models.intervals import LEVEL, wilson
from refract.pipeline.evaluation.intervals import DRAWS, class_intervals, macro_interval
from refract.pipeline.evaluation.label_errors import confident_learning
from refract.pipeline.evaluation.measures import calibration_error

CHUNK = 100
"""Bootstrap resamples per chunk, which bounds the memory."""


def set_errors(predicted: np.ndarray, truth: np.ndarray, unknown: np.ndarray | int = 0) -> np.ndarray:
    """Return (N,) in 0…1: one minus the F1 of each image's predicted set against its true set, 0 where both are empty.

    With exactly one label in each set, the error is 0 for a right prediction and 1 for a wrong one. unknown: number of true labels of
    each image that the classifier cannot predict because it lacks them.
    """
    hits = (predicted & truth).sum(axis=1)
    sizes = predicted.sum(axis=1) + truth.sum(axis=1) + unknown
    return np.where(sizes > 0, 1 - 2 * hits / np.maximum(sizes, 1), 0.0)


def label_rates(predicted: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Return the `rates` of predictions, bool (N, C)."""
    return rates(*(array.sum(axis=0) for array in (predicted & truth, predicted, truth)))


def rates(hits: np.ndarray, given: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    """Return `precision`, `recall` and `f1` (C,) of each label, and `micro_f1` () of all labels; undefined rates are 0.

    hits, given, real: (C,) numbers of right predictions, of predictions, and of samples of each label.
    """
    return {
        "precision": hits / np.maximum(given, 1),
        "recall": hits / np.maximum(real, 1),
        "f1": 2 * hits / np.maximum(given + real, 1),
        "micro_f1": 2 * hits.sum() / np.maximum((given + real).sum(), 1),
    }


def set_intervals(predicted: np.ndarray, truth: np.ndarray, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the LEVEL intervals of multi-label metrics, see `refract.pipeline.evaluation.intervals`.

    `macro_f1` and `micro_f1`: (2,); `precision`, `recall` and `f1` of each label: (C, 2). `micro_f1` uses a percentile bootstrap. Where
    every image is right, the bootstrap has no width, and Wilson's interval of N successes in N trials replaces it.
    """
    counts = tuple(array.sum(axis=0) for array in (predicted & truth, predicted, truth))
    bounds = class_intervals(*counts)
    hits, both = _drawn_counts(predicted, truth, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        of_labels, of_all = 2 * hits / both, 2 * hits.sum(axis=1) / both.sum(axis=1)
    edges = [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2]
    micro = np.percentile(of_all[~np.isnan(of_all)], edges) if not np.isnan(of_all).all() else np.array([0.0, 1.0])
    if (predicted == truth).all():
        micro = wilson(np.array([len(truth)]), np.array([len(truth)]))[0]
    never = counts[1] + counts[2] == 0  # the metric counts such a label as 0
    of_labels, f1_bounds = np.where(never, 0.0, of_labels), np.where(never[:, None], 0.0, bounds["f1"])
    macro = macro_interval(of_labels, label_rates(predicted, truth)["f1"], f1_bounds)
    return {"macro_f1": macro, "micro_f1": micro, **bounds}


def _drawn_counts(predicted: np.ndarray, truth: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (hits, predictions plus true labels) of each label in bootstrap resamples of the images, (DRAWS, C) each."""
    # Images with the same two sets are interchangeable: a resample draws the count of each such kind of image.
    kinds, kind_counts = np.unique(np.concatenate([predicted, truth], axis=1), axis=0, return_counts=True)
    predicted_kinds, true_kinds = np.split(kinds, 2, axis=1)
    columns = [predicted_kinds & true_kinds, predicted_kinds.astype(int) + true_kinds]
    kind_columns = np.concatenate(columns, axis=1).astype(np.float64)
    rng, fractions = np.random.default_rng(seed), kind_counts / len(truth)
    chunks = [rng.multinomial(len(truth), fractions, size=CHUNK) @ kind_columns for _ in range(0, DRAWS, CHUNK)]
    hits, both = np.split(np.concatenate(chunks), 2, axis=1)
    return hits, both


def label_calibration_errors(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the expected calibration error of each label (C,). The error over all labels is dominated by frequent negatives."""
    columns = range(truth.shape[1])
    return np.array([calibration_error(probabilities[:, [k]], truth[:, [k]], multilabel=True) for k in columns])


@dataclass(frozen=True)
class WrongLabel:
    """A label of an image that is likely wrong.

    image: index of the image; label: index of the label; kind: `missing` if the image should have the label, `extra` if it should not;
    probability: the probability of the label.
    """

    image: int
    label: int
    kind: Literal["missing", "extra"]
    probability: float


def likely_wrong_labels(probabilities: np.ndarray, truth: np.ndarray) -> list[WrongLabel]:
    """Return the labels that are likely missing or extra, the likeliest first.

    Applies `confident_learning` to each label against its absence. probabilities: (N, C), on images that the model was not trained on.
    """
    candidates = []
    for label in range(truth.shape[1]):
        column = probabilities[:, label].astype(np.float64)
        indices, margins = confident_learning(np.stack([1 - column, column], axis=1), truth[:, label].astype(int))
        for index, margin in zip(indices.tolist(), margins.tolist(), strict=True):
            kind: Literal["missing", "extra"] = "extra" if truth[index, label] else "missing"
            candidates.append((margin, WrongLabel(index, label, kind, float(column[index]))))
    return [wrong for _, wrong in sorted(candidates, key=lambda pair: -pair[0])]
