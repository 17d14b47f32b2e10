"""Labels that the other images contradict, by predictions of models that were not trained on the image."""

import numpy as np

from refract.pipeline.review.data import ReviewData, listed, percent
from refract.pipeline.review.items import Entry

FRACTION = 0.2
"""The largest fraction of the data set in the queue. Rarer errors are found sooner by a random audit."""


def label_errors(data: ReviewData) -> tuple[Entry, ...]:
    """Rank the items of the data set whose label is less probable than another, at most FRACTION of them."""
    scores = doubt(data.out_of_fold, data.targets, multilabel=data.multilabel)
    order = np.argsort(-scores, kind="stable")[: max(1, int(FRACTION * data.labelled))]
    return tuple(
        Entry(item, round(float(scores[item]), 4), _reason(data, item)) for item in order.tolist() if scores[item] > 0
    )


def doubt(probabilities: np.ndarray, targets: np.ndarray, *, multilabel: bool) -> np.ndarray:
    """Return how strongly the predictions contradict the labels, float (N,) in -1…1, -1 for rows of NaN.

    It is the probability of the best other label minus that of the given one; for multi-label, the largest contradiction of one label:
    2·|target − probability| − 1. Source: the normalised margin of Northcutt et al. 2021, arXiv:1911.00068, section 3.2.
    """
    if multilabel:
        scores = (2 * np.abs(targets - probabilities) - 1).max(axis=1)
    else:
        given = np.where(targets, probabilities, 0).sum(axis=1)
        scores = np.where(targets, -1, probabilities).max(axis=1) - given
    return np.asarray(np.where(np.isnan(scores), -1, scores))


def _reason(data: ReviewData, item: int) -> str:
    row, targets = data.out_of_fold[item], data.targets[item]
    if data.multilabel:
        column = int(np.abs(targets - row).argmax())
        verb = "has" if targets[column] else "lacks"
        return f"The image {verb} the label {data.labels[column]}, whose probability is {percent(row[column])}."
    other = int(np.where(targets, -1, row).argmax())
    given = float(row[targets].sum())
    return (
        f"Models trained on other images predict {data.labels[other]} ({percent(row[other])}), "
        f"not {listed(data.items[item].labels)} ({percent(given)})."
    )
