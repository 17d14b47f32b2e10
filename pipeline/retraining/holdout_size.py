"""What a holdout of N samples can decide about two classifiers. Plain numbers in and out."""

import math

Z = 1.959964
"""The normal distribution's 97.5 % quantile: a 95 % interval extends this many standard errors to each side."""

DISAGREEMENT = 0.2
"""The fraction of samples that only one of two classifiers predicts correctly, as `lowest_gain` assumes it. It is high for two trainings
on nearly the same data. It is fixed, so that the bound is known before the measurement."""

SMALLEST, LARGEST = 0.01, 0.05
"""The range of the loss that `lowest_gain` tolerates. A smaller loss is below the label errors of a holdout. A larger one is an
unacceptable regression: on a holdout of a coarser resolution the challenger needs an observed gain."""


def resolution(count: int, disagreement: float = DISAGREEMENT) -> float:
    """Return the smallest difference in accuracy that `count` samples distinguish from 0: half the width of its paired 95 % interval.

    count: at least 1; disagreement: the fraction of the samples that only one classifier predicts correctly, in [0, 1].
    Source: McNemar 1947; the variance of paired proportions without a difference is disagreement / count.
    """
    return Z * math.sqrt(disagreement / count)


def lowest_gain(count: int) -> float:
    """Return the bound that the lower end of the gain's interval must reach on a holdout of `count` samples, in [-LARGEST, -SMALLEST]."""
    return -min(max(resolution(count), SMALLEST), LARGEST)


def samples_to_decide(better: int, worse: int, count: int, bound: float) -> int | None:
    """Return the holdout size from which the 95 % interval of the observed gain excludes the bound, all else as observed.

    better, worse: samples of `count` that only the challenger, or only the champion, predicts correctly; bound: a gain in accuracy.
    The result is at least 1. None if the gain equals the bound, which no size decides.
    """
    gain = (better - worse) / count
    variance = (better + worse) / count - gain**2
    if math.isclose(gain, bound, abs_tol=1e-12):
        return None
    return max(1, math.ceil(Z**2 * variance / (gain - bound) ** 2))


def rounded(count: int) -> int:
    """Round the count up to two significant digits: 6,147 → 6,200."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit
