"""Measure multi-label predictions: each image has a set of true labels and a set of predicted ones. Arrays in, numbers out.

answers, truth: (N, C) bool.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refract.pipeline.evaluation.intervals import DRAWS, LEVEL, class_intervals, macro_interval, wilson
from refract.pipeline.evaluation.measures import calibration_error, suspects

CHUNK = 100
"""Bootstrap draws at a time, which bounds the memory."""


def set_errors(answers: np.ndarray, truth: np.ndarray, unknown: np.ndarray | int = 0) -> np.ndarray:
    """(N,) in 0…1: one minus the F1 of each image's predicted set against its true set, 0 where both are empty.

    With exactly one label in each set this is 0 for a right prediction and 1 for a wrong one. unknown: how many true labels of each image
    the classifier does not know, and so cannot predict.
    """
    hits = (answers & truth).sum(axis=1)
    sizes = answers.sum(axis=1) + truth.sum(axis=1) + unknown
    return np.where(sizes > 0, 1 - 2 * hits / np.maximum(sizes, 1), 0.0)


def label_rates(answers: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """`precision`, `recall` and `f1` (C,) of each label and `micro_f1` () of all together; 0 where one is undefined."""
    hits, given, real = (answers & truth).sum(axis=0), answers.sum(axis=0), truth.sum(axis=0)
    return {
        "precision": hits / np.maximum(given, 1),
        "recall": hits / np.maximum(real, 1),
        "f1": 2 * hits / np.maximum(given + real, 1),
        "micro_f1": 2 * hits.sum() / np.maximum((given + real).sum(), 1),
    }


def set_intervals(answers: np.ndarray, truth: np.ndarray, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Intervals (LEVEL): `macro_f1` and `micro_f1` (2,), and `precision`, `recall` and `f1` (C, 2) of each label, see
    `refract.pipeline.evaluation.intervals`.

    `micro_f1` is by percentile bootstrap; where every image is right, that has no width, and Wilson's interval of "all N are right" stands.
    """
    counts = tuple(array.sum(axis=0) for array in (answers & truth, answers, truth))
    bounds = class_intervals(*counts)
    hits, both = _drawn_counts(answers, truth, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        of_labels, of_all = 2 * hits / both, 2 * hits.sum(axis=1) / both.sum(axis=1)
    edges = [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2]
    micro = np.percentile(of_all[~np.isnan(of_all)], edges) if not np.isnan(of_all).all() else np.array([0.0, 1.0])
    if (answers == truth).all():
        micro = wilson(np.array([len(truth)]), np.array([len(truth)]))[0]
    never = counts[1] + counts[2] == 0  # such a label counts 0 in the metric
    of_labels, f1_bounds = np.where(never, 0.0, of_labels), np.where(never[:, None], 0.0, bounds["f1"])
    macro = macro_interval(of_labels, label_rates(answers, truth)["f1"], f1_bounds)
    return {"macro_f1": macro, "micro_f1": micro, **bounds}


def _drawn_counts(answers: np.ndarray, truth: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(hits, predictions plus true labels), (DRAWS, C) each, of each label in bootstrap draws of the images."""
    # Images with the same two sets are interchangeable: a draw says how often each such kind of image is seen.
    kinds, numbers = np.unique(np.concatenate([answers, truth], axis=1), axis=0, return_counts=True)
    said, present = np.split(kinds, 2, axis=1)
    columns = np.concatenate([said & present, said.astype(int) + present], axis=1).astype(np.float64)
    rng, shares = np.random.default_rng(seed), numbers / len(truth)
    parts = [rng.multinomial(len(truth), shares, size=CHUNK) @ columns for _ in range(0, DRAWS, CHUNK)]
    hits, both = np.split(np.concatenate(parts), 2, axis=1)
    return hits, both


def label_calibration_errors(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(C,): the expected calibration error of each label alone. That of all labels together is mostly that of frequent negatives."""
    columns = range(truth.shape[1])
    return np.array([calibration_error(probabilities[:, [k]], truth[:, [k]], multilabel=True) for k in columns])


@dataclass(frozen=True)
class WrongLabel:
    """A label of an image that is likely wrong. image: its index; label: the label's index; kind: `missing`, the image should carry the
    label, or `extra`, it should not; probability: of the label."""

    image: int
    label: int
    kind: Literal["missing", "extra"]
    probability: float


def likely_wrong_labels(probabilities: np.ndarray, truth: np.ndarray) -> list[WrongLabel]:
    """Labels that are likely missing or extra, the likeliest first: confident learning (see `measures.likely_label_errors`) of each label
    against its absence. probabilities: (N, C). The images must not have been trained on."""
    found = []
    for label in range(truth.shape[1]):
        column = probabilities[:, label].astype(np.float64)
        places, margins = suspects(np.stack([1 - column, column], axis=1), truth[:, label].astype(int))
        for place, margin in zip(places.tolist(), margins.tolist(), strict=True):
            kind: Literal["missing", "extra"] = "extra" if truth[place, label] else "missing"
            found.append((margin, WrongLabel(place, label, kind, float(column[place]))))
    return [wrong for _, wrong in sorted(found, key=lambda pair: -pair[0])]
