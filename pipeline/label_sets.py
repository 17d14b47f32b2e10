"""Measure multi-label predictions: each image has a set of true labels and a set of predicted ones. Arrays in, numbers out.

answers, truth: (N, C) bool.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.measures import DRAWS, LEVEL, calibration_error, suspects

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
    """Percentile bootstrap intervals (LEVEL) over DRAWS draws of the images: `macro_f1` and `micro_f1` (2,), and `precision`, `recall` and
    `f1` (C, 2) of each label. A draw without the label, or in which it is not predicted, says nothing of it."""
    count = truth.shape[1]
    # Images with the same two sets are interchangeable: a draw says how often each such kind of image is seen.
    kinds, numbers = np.unique(np.concatenate([answers, truth], axis=1), axis=0, return_counts=True)
    said, present = kinds[:, :count], kinds[:, count:]
    columns = np.concatenate([said & present, said, present], axis=1).astype(np.float64)
    rng, parts = np.random.default_rng(seed), []
    for _ in range(0, DRAWS, CHUNK):
        parts.append(rng.multinomial(len(truth), numbers / len(truth), size=CHUNK) @ columns)
    hits, given, real = np.split(np.concatenate(parts), 3, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {"precision": hits / given, "recall": hits / real, "f1": 2 * hits / (given + real)}
        found["micro_f1"] = 2 * hits.sum(axis=1) / (given.sum(axis=1) + real.sum(axis=1))
    never = np.isnan(found["f1"]).all(axis=0)
    found["macro_f1"] = np.nanmean(np.where(never, 0.0, found["f1"]), axis=1)
    edges = [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2]
    known = {name: np.where(np.isnan(values).all(axis=0), 0.0, values) for name, values in found.items()}
    return {name: np.nanpercentile(values, edges, axis=0).T for name, values in known.items()}


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
