"""Two-sample tests: whether two samples have one distribution, and how far apart they are. Pure functions of arrays.

Each returns a `Found`: an interpretable distance, its mean by chance alone if the distributions are equal, and a p-value.
"""

from typing import NamedTuple

import numpy as np

PERMUTATIONS = 2000
"""The number of permutations: Holm over a dozen tests leaves the smallest p-value, 1 / 2001, below 0.01."""

MOST = 1000
"""The largest number of rows of each sample in `mmd` and `classifier`: a kernel of 2,000² numbers takes a second."""

SMOOTHING = 0.5
"""The addend to each count in `psi`, as an empty bin would make it infinite. 0.5 is Jeffreys' prior of a multinomial."""

EXPECTED = 5.0
"""The expected count below which `counts` draws random tables, as the χ² approximation fails there (Cochran 1954)."""


class Found(NamedTuple):
    """value: the distance; chance: its mean for equal distributions; p: the probability of at least this distance by chance."""

    value: float
    chance: float
    p: float


def mmd(x: np.ndarray, y: np.ndarray, *, seed: int = 0, permutations: int = PERMUTATIONS) -> Found:
    """Return the squared maximum mean discrepancy of x (m, d) and y (n, d), of at most MOST rows each. Unbiased, so that chance is 0.

    With k(a, b) = exp(−‖a − b‖² / 2σ²), σ the median distance between different rows of both together:
    Σ_{i≠j} k(xᵢ, xⱼ) / m(m−1) + Σ_{i≠j} k(yᵢ, yⱼ) / n(n−1) − 2 Σᵢⱼ k(xᵢ, yⱼ) / mn.
    p: the fraction of `permutations` of the rows with at least this value, including the observed one, so that p is exact and above 0.
    Source: Gretton et al. 2012, "A kernel two-sample test", JMLR 13, lemma 6 (the estimate) and section 8 (the median).
    """
    rng = np.random.default_rng(seed)
    x, y = (at_most(rows, MOST, rng) for rows in (x, y))
    m, n = len(x), len(y)
    kernel = rbf(np.concatenate([x, y]))
    np.fill_diagonal(kernel, 0)
    inside = np.zeros((permutations + 1, m + n), np.float32)
    inside[0, :m] = 1
    for row in inside[1:]:
        row[rng.permutation(m + n)[:m]] = 1
    # Sums of the kernel: within x, and from x to all rows. The rest of the total is within y; pairs between x and y count twice.
    within_x = np.einsum("ij,ij->i", inside @ kernel, inside, dtype=np.float64)
    of_x = inside.astype(np.float64) @ kernel.sum(axis=1, dtype=np.float64)
    between = of_x - within_x
    within_y = kernel.sum(dtype=np.float64) - 2 * between - within_x
    values = within_x / (m * (m - 1)) + within_y / (n * (n - 1)) - 2 * between / (m * n)
    # Sums of one kernel in two orders differ in the last digits, but must count as equal.
    at_least = int((values[1:] >= values[0] - 1e-7).sum())
    return Found(float(values[0]), 0.0, (1 + at_least) / (1 + permutations))


def rbf(rows: np.ndarray) -> np.ndarray:
    """Return the kernel of `mmd` between all rows, float32; all ones if all rows are equal."""
    squares = squared_distances(rows, rows)
    middle = float(np.median(squares[np.triu_indices(len(rows), 1)]))
    if middle <= 0:  # more than half of the pairs are equal: use the mean
        middle = float(squares.mean()) or 1.0
    return np.exp(-squares / (2 * middle))


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return (len(a), len(b)) float32 squared distances, at least 0. The mean is subtracted first, as large values lose digits."""
    centre = a.mean(axis=0, dtype=np.float64)
    a, b = ((rows - centre).astype(np.float32) for rows in (a, b))
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * (a @ b.T)
    return np.maximum(squares, 0)


def classifier(x: np.ndarray, y: np.ndarray, *, seed: int = 0) -> Found:
    """Return the accuracy of a logistic regression, fitted on half of the rows, in predicting the sample of each other row.

    Both samples have equally many rows, so that chance is 0.5. Features are standardised by the fitted half. p: one-sided, of the binomial
    distribution. Source: Lopez-Paz & Oquab 2017, "Revisiting classifier two-sample tests", arXiv:1610.06545, section 3.
    Deviation: the exact binomial in place of its normal approximation.
    """
    from scipy.stats import binomtest
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(seed)
    count = min(len(x), len(y), MOST)
    parts = [rows[rng.permutation(len(rows))[:count]].astype(np.float64) for rows in (x, y)]
    half = count // 2
    fitted, judged = (np.concatenate([part[cut] for part in parts]) for cut in (slice(half), slice(half, None)))
    centre, spread = fitted.mean(axis=0), fitted.std(axis=0) + 1e-9
    model = LogisticRegression(C=0.1, max_iter=500).fit((fitted - centre) / spread, np.repeat([0, 1], half))
    answers = model.predict((judged - centre) / spread)
    right = int((answers == np.repeat([0, 1], count - half)).sum())
    p = binomtest(right, len(judged), alternative="greater").pvalue
    return Found(right / len(judged), 0.5, float(p))


def psi(expected: np.ndarray, actual: np.ndarray) -> float:
    """Return the population stability index of two counts of the same bins: Σ (a − e) · ln(a / e) of the fractions, with SMOOTHING.

    Symmetric, at least 0. Source: Siddiqi 2006, "Credit risk scorecards"; it is Jeffreys' divergence.
    """
    e, a = ((counts + SMOOTHING) / (counts.sum() + SMOOTHING * len(counts)) for counts in (expected, actual))
    return float(((a - e) * np.log(a / e)).sum())


def counts(expected: np.ndarray, actual: np.ndarray, *, seed: int = 0) -> Found:
    """Return `psi` of two counts (C,) of the same classes, with the p-value of the χ² test. Classes with a count of 0 in both are excluded.

    chance: (C − 1) (1/m + 1/n), the mean of the index between samples of m and n (Yurdakul 2018, "Statistical properties of population
    stability index", section 2). If an expected count is below EXPECTED, p is computed from random tables with the same sums.
    """
    from scipy.stats import chi2_contingency

    table = np.stack([expected, actual]).astype(np.int64)
    table = table[:, table.sum(axis=0) > 0]
    if table.shape[1] < 2 or not table.sum(axis=1).all():
        return Found(0.0, 0.0, 1.0)
    chance = (table.shape[1] - 1) * float((1 / table.sum(axis=1)).sum())
    statistic, p, _, frequencies = chi2_contingency(table, correction=False)
    if frequencies.min() < EXPECTED:
        rng = np.random.default_rng(seed)
        columns = table.sum(axis=0)
        first = rng.multivariate_hypergeometric(columns, int(table[0].sum()), size=PERMUTATIONS, method="marginals")
        drawn = ((first - frequencies[0]) ** 2 * (1 / frequencies[0] + 1 / frequencies[1])).sum(axis=1)
        p = (1 + int((drawn >= statistic * (1 - 1e-9)).sum())) / (1 + PERMUTATIONS)
    return Found(psi(table[0], table[1]), chance, float(p))


def kolmogorov(x: np.ndarray, y: np.ndarray) -> Found:
    """Return the largest distance between the two distribution functions, in [0, 1], with the p-value of the Kolmogorov-Smirnov test.

    chance: √(π/2) ln 2 · √(1/m + 1/n), the mean of Kolmogorov's distribution. With ties p is too large rather than too small.
    """
    from scipy.stats import ks_2samp

    result = ks_2samp(x, y, method="auto")
    chance = np.sqrt(np.pi / 2) * np.log(2) * np.sqrt(1 / len(x) + 1 / len(y))
    return Found(float(result.statistic), float(chance), float(result.pvalue))


def holm(values: list[float]) -> list[float]:
    """Adjust the p-values of several, perhaps dependent tests: the probability of any false one below α is at most α.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(values, kind="stable")
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def at_most(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` of the rows without replacement, in their order; all rows if there are fewer."""
    return rows if len(rows) <= count else rows[np.sort(rng.permutation(len(rows))[:count])]
