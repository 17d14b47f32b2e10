"""What a holdout of so many samples can decide about two classifiers. Plain numbers in and out; knows nothing of images or bundles."""

import math

Z = 1.959964
"""The normal distribution's 97.5 % quantile: a 95 % interval reaches so many standard errors to each side."""

DISAGREEMENT = 0.2
"""The fraction of samples that only one of two classifiers has right, for which `lowest_gain` is made: much for two trainings on nearly
the same data. It is fixed, so that the bound is known before anything is measured."""

SMALLEST, LARGEST = 0.01, 0.05
"""The loss that `lowest_gain` tolerates at least and at most. A smaller one drowns in a holdout's own label errors. A larger one is a
regression that nobody accepts: a holdout that resolves no better asks the challenger for an observed gain."""


def resolution(count: int, disagreement: float = DISAGREEMENT) -> float:
    """The smallest difference in accuracy that `count` samples can tell from 0: half the width of its paired 95 % interval.

    count: at least 1; disagreement: the fraction of the samples that only one classifier has right, in [0, 1].
    Source: McNemar 1947; the variance of paired proportions without a difference is disagreement / count.
    """
    return Z * math.sqrt(disagreement / count)


def lowest_gain(count: int) -> float:
    """The bound that the lower end of the gain's interval must reach on a holdout of `count` samples, in [-LARGEST, -SMALLEST]."""
    return -min(max(resolution(count), SMALLEST), LARGEST)


def samples_to_decide(better: int, worse: int, count: int, bound: float) -> int | None:
    """The holdout size from which the 95 % interval of the observed gain excludes the bound, with everything else as it was observed.

    better, worse: samples that only the challenger, only the champion has right, of `count`; bound: a gain in accuracy. None where the
    gain is the bound exactly, which no size decides. At least 1.
    """
    gain = (better - worse) / count
    variance = (better + worse) / count - gain**2
    if math.isclose(gain, bound, abs_tol=1e-12):
        return None
    return max(1, math.ceil(Z**2 * variance / (gain - bound) ** 2))


def rounded(count: int) -> int:
    """The count with two significant digits, rounded up: 6,147 → 6,200."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit
