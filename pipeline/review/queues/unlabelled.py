"""A diverse batch of unlabelled images whose labels would teach the most: uncertain ones, and not many of one kind."""

import numpy as np

from refract.pipeline.review.data import ReviewData, percent
from refract.pipeline.review.items import Entry

BATCH, CANDIDATES, MOST = 20, 10, 1000
"""Images in a batch; candidates for each of them, the most uncertain ones; images in the queue."""


def unlabelled(data: ReviewData) -> tuple[Entry, ...] | None:
    """Rank the new items in batches of BATCH, each diverse. None without new items."""
    items = data.unlabelled()
    if not items:
        return None
    predicted = data.predicted
    row_of = {item: row for row, item in enumerate(predicted.items)}
    known = np.array([item in row_of for item in items])
    uncertain = np.ones(len(items))  # of an item that the bundle could not predict
    rows = predicted.rows[[row_of[item] for item in items if item in row_of]]
    uncertain[known] = uncertainty_of(rows, multilabel=data.multilabel)
    entries: list[Entry] = []
    left = np.ones(len(items), bool)
    while len(entries) < min(MOST, len(items)):
        open_rows = np.flatnonzero(left)
        chosen = diverse(data.vectors[np.asarray(items)[open_rows]], uncertain[open_rows], BATCH)
        for row in open_rows[chosen].tolist():
            left[row] = False
            entries.append(Entry(items[row], round(float(uncertain[row]), 4), _reason(data, items[row])))
    return tuple(entries)


def diverse(vectors: np.ndarray, uncertainty: np.ndarray, count: int) -> np.ndarray:
    """Choose `count` rows that are uncertain and differ from each other.

    vectors: float32 (N, D), of length 1; uncertainty: (N,) in 0…1. Returns int (min(count, N),). The most uncertain CANDIDATES · count rows
    are clustered into `count` clusters, weighted by their uncertainty, and the row nearest to each centre is chosen.
    Source: Zhdanov 2019, "Diverse mini-batch active learning", arXiv:1901.05954, section 3.
    """
    candidates = np.argsort(-uncertainty, kind="stable")[: CANDIDATES * count]
    if len(candidates) <= count:
        return candidates
    from sklearn.cluster import KMeans

    points = vectors[candidates]
    weights = np.maximum(uncertainty[candidates], 1e-3)
    centres = KMeans(count, n_init=1, random_state=0).fit(points, sample_weight=weights).cluster_centers_
    chosen: list[int] = []
    for order in np.argsort(((points[None] - centres[:, None]) ** 2).sum(axis=2), axis=1, kind="stable"):
        chosen.append(next(row for row in order.tolist() if row not in chosen))
    return candidates[chosen]


def uncertainty_of(rows: np.ndarray, *, multilabel: bool) -> np.ndarray:
    """Return 1 − the margin between the two most probable labels, float (N,) in 0…1; for multi-label that of the least certain label."""
    if multilabel or rows.shape[1] < 2:
        return np.asarray(1 - np.abs(2 * rows - 1).min(axis=1))
    best = np.sort(rows, axis=1)[:, -2:]
    return np.asarray(1 - (best[:, 1] - best[:, 0]))


def _reason(data: ReviewData, item: int) -> str:
    if not data.items[item].predictions:
        return "The model has no prediction for this image."
    first, *others = data.items[item].predictions
    if data.multilabel or not others:
        return f"The model is unsure: {first.label} has {percent(first.probability)}."
    return f"The model is unsure: {first.label} has {percent(first.probability)}, {others[0].label} {percent(others[0].probability)}."
