"""Confidence intervals of metrics on a test set: NumPy arrays in, NumPy arrays out."""

import numpy as np

from refract.models.intervals import LEVEL, wilson

DRAWS = 1000
"""Number of bootstrap resamples of the images."""


def class_intervals(hits: np.ndarray, given: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    """Return the LEVEL intervals (C, 2) of each class's `precision`, `recall` and `f1`.

    hits: (C,) true positives; given: (C,) predictions of the class; real: (C,) images of the class. Precision and recall are proportions.
    F1 = 2J / (1 + J) rises with the Jaccard index J = hits / (given + real - hits), which is a proportion too. A percentile bootstrap
    would have no width where no image is wrong: it covered the precision of rare classes in only a third of the cases.
    """
    jaccard = wilson(hits, given + real - hits)
    return {"precision": wilson(hits, given), "recall": wilson(hits, real), "f1": 2 * jaccard / (1 + jaccard)}


def macro_interval(drawn: np.ndarray, values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return the LEVEL interval (2,) of macro F1, the mean of `values` (C,).

    values: the F1 of each class; drawn: (DRAWS, C), the F1 in bootstrap resamples, NaN where a resample lacks the class; bounds: (C, 2),
    the interval of each class's F1. Each end is the wider of two estimates. The percentile bootstrap accounts for errors that affect two
    classes. The mean of independent values with these bounds has a width even where no image is wrong (Zou & Donner 2008, "Construction
    of confidence limits about effect measures: a general approach", section 2).
    """
    present = ~np.isnan(drawn).all(axis=0)
    if not present.any():
        return np.array([0.0, 1.0])
    low, high = np.percentile(np.nanmean(drawn[:, present], axis=1), [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2])
    mean, count = values[present].mean(), present.sum()
    below, above = (np.sqrt(((values[present] - bounds[present, edge]) ** 2).sum()) / count for edge in (0, 1))
    return np.clip([min(low, mean - below), max(high, mean + above)], 0.0, 1.0)
