"""Labels that the other images contradict, by predictions of models that were not trained on the image."""

from collections.abc import Sequence

import numpy as np

from refract.pipeline.review.data import ReviewData, listed, percent
from refract.pipeline.review.items import Entry

FRACTION = 0.2
"""The largest fraction of the data set in the queue. Rarer errors are found sooner by a random audit."""


def label_errors(data: ReviewData) -> tuple[Entry, ...]:
    """Rank the items of the data set for which another label is more probable, at most FRACTION of them."""
    scores = doubt(data.out_of_fold, data.targets, multilabel=data.multilabel)
    contradicted = np.flatnonzero(_contradicted(data.out_of_fold, data.targets, multilabel=data.multilabel))
    order = contradicted[np.argsort(-scores[contradicted], kind="stable")][: max(1, int(FRACTION * data.labelled))]
    return tuple(Entry(item, round(float(scores[item]), 4), _reason(data, item)) for item in order.tolist())


def doubt(probabilities: np.ndarray, targets: np.ndarray, *, multilabel: bool) -> np.ndarray:
    """Return how strongly the predictions contradict the labels, float (N,) in 0…1, 0 for rows of NaN.

    It is 1 − the probability of the label, for multi-label of the least probable decision on a label: the self-confidence of Northcutt et
    al. 2021, arXiv:1911.00068, section 3.2. On CIFAR-10 it found more flipped labels than their normalised margin: see
    `benchmarks.loop`, stage label-errors.
    """
    given = np.where(targets, probabilities, 0).sum(axis=1)
    scores = np.abs(targets - probabilities).max(axis=1) if multilabel else 1 - given
    return np.asarray(np.nan_to_num(scores, nan=0.0))


def _contradicted(probabilities: np.ndarray, targets: np.ndarray, *, multilabel: bool) -> np.ndarray:
    """Return whether another label, or for multi-label another decision, is more probable, bool (N,)."""
    if multilabel:
        return np.asarray((np.abs(targets - probabilities) > 0.5).any(axis=1))
    given = np.where(targets, probabilities, 0).sum(axis=1)
    return np.asarray(np.where(targets, -1, probabilities).max(axis=1) > given)


def _reason(data: ReviewData, item: int) -> str:
    row, targets = data.out_of_fold[item], data.targets[item]
    if data.multilabel:
        column = int(np.abs(targets - row).argmax())
        verb = "has" if targets[column] else "lacks"
        return f"The image {verb} the label {data.labels[column]}, whose probability is {percent(row[column])}."
    other = int(np.where(targets, -1, row).argmax())
    given = float(row[targets].sum())
    common = _common_parent(data, data.labels[other], data.items[item].labels)
    return (
        f"Models trained on other images predict {data.labels[other]} ({percent(row[other])}), "
        f"not {listed(data.items[item].labels)} ({percent(given)}){f'; both are {common}' if common else ''}."
    )


def _common_parent(data: ReviewData, label: str, others: Sequence[str]) -> str | None:
    """Return the lowest ancestor of a label and of all others, None without one."""
    shared = [set(data.ancestors(other)) for other in others]
    return next((node for node in data.ancestors(label) if all(node in nodes for nodes in shared)), None)
