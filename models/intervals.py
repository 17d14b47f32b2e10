"""Confidence intervals of proportions, for evaluation and for the live accuracy of a server."""

from statistics import NormalDist

import numpy as np

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""The quantile of the normal distribution for a two-sided interval of LEVEL."""


def wilson(successes: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """Return the LEVEL intervals (C, 2) of proportions by Wilson's score (Wilson 1927), [0, 1] without trials.

    successes, trials: (C,).
    """
    n = np.maximum(trials, 1).astype(np.float64)
    p = successes / n
    centre, spread = p + Z**2 / (2 * n), Z * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    edges = np.stack([centre - spread, centre + spread], axis=-1) / (1 + Z**2 / n)[:, None]
    # Rounding could exclude the proportion itself where all trials or none succeed.
    edges[successes == trials, 1], edges[successes == 0, 0] = 1.0, 0.0
    return np.where(trials[:, None] > 0, edges, (0.0, 1.0))
