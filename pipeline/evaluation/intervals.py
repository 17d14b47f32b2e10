"""Confidence intervals of metrics on a test set. Arrays in, numbers out."""

import numpy as np

DRAWS = 1000
"""Bootstrap draws of the images."""

LEVEL = 0.95


def wilson(successes: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """The LEVEL intervals (C, 2) of proportions by Wilson's score (Wilson 1927); 0 to 1 where there is no trial. Both arguments: (C,)."""
    from scipy.special import ndtri

    z, n = ndtri((1 + LEVEL) / 2), np.maximum(trials, 1).astype(np.float64)
    p = successes / n
    centre, spread = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    edges = np.stack([centre - spread, centre + spread], axis=-1) / (1 + z**2 / n)[:, None]
    # The rounded edges of "all" and "none" would leave the proportion itself out.
    edges[successes == trials, 1], edges[successes == 0, 0] = 1.0, 0.0
    return np.where(trials[:, None] > 0, edges, (0.0, 1.0))


def class_intervals(hits: np.ndarray, given: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    """LEVEL intervals of `precision`, `recall` and `f1` (C, 2) of each class.

    hits, given, real: (C,) images that carry the class and are predicted to, that are predicted to, and that carry it. Precision and
    recall are proportions. F1 = 2J / (1 + J) rises with the Jaccard index J = hits / (given + real - hits), which is a proportion too.
    A percentile bootstrap of these has no width where no image is wrong: it held the precision of rare classes in a third of the cases.
    """
    jaccard = wilson(hits, given + real - hits)
    return {"precision": wilson(hits, given), "recall": wilson(hits, real), "f1": 2 * jaccard / (1 + jaccard)}


def macro_interval(drawn: np.ndarray, values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The LEVEL interval (2,) of the mean of `values` (C,), one F1 a class, from bootstrap draws of them and the intervals of each.

    drawn: (DRAWS, C), NaN where a draw has no such class; bounds: (C, 2). At each end the wider of two: the percentile bootstrap, which
    knows that an error touches two classes, and the mean of independent values with these bounds, which has a width where no image is
    wrong (Zou & Donner 2008, "Construction of confidence limits about effect measures: a general approach", section 2).
    """
    known = ~np.isnan(drawn).all(axis=0)
    if not known.any():
        return np.array([0.0, 1.0])
    low, high = np.percentile(np.nanmean(drawn[:, known], axis=1), [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2])
    mean, count = values[known].mean(), known.sum()
    below, above = (np.sqrt(((values[known] - bounds[known, edge]) ** 2).sum()) / count for edge in (0, 1))
    return np.clip([min(low, mean - below), max(high, mean + above)], 0.0, 1.0)
