"""Figures of answers that were given: calibration, intervals, what abstaining brings. Arrays in, numbers out.

probabilities: float (N, C), rows that sum to 1, for multilabel one probability a label; truth: int (N,) class indices, for multilabel bool
(N, C).
"""

from dataclasses import dataclass

import numpy as np

from refract.pipeline.evaluation.intervals import DRAWS, LEVEL, class_intervals, macro_interval, wilson

BINS = 15


def fit_temperature(probabilities: np.ndarray, truth: np.ndarray, *, multilabel: bool, given_at: float = 1.0) -> float:
    """The temperature that gives the answers the highest likelihood, between 1/20 and 20.

    given_at: the temperature of the probabilities; at a high one float32 still tells the most confident answers apart.
    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        changed = at_temperature(probabilities, np.exp(log_temperature) / given_at, multilabel=multilabel)
        return nll(changed, truth, multilabel=multilabel)

    bound = np.log(20)
    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x))


def at_temperature(probabilities: np.ndarray, temperature: float, *, multilabel: bool) -> np.ndarray:
    """The probabilities with their logits divided by the temperature."""
    from scipy.special import expit, log_softmax, logit

    safe = np.clip(probabilities.astype(np.float64), _TINY, 1 - _TINY if multilabel else 1)
    if multilabel:
        return expit(logit(safe) / temperature)
    return np.exp(log_softmax(np.log(safe) / temperature, axis=1))


def nll(probabilities: np.ndarray, truth: np.ndarray, *, multilabel: bool) -> float:
    """Mean negative log likelihood in nats: of the true class, for multilabel of each label."""
    from sklearn.metrics import log_loss

    if multilabel:
        return float(log_loss(truth.ravel(), np.clip(probabilities.ravel(), _TINY, 1 - _TINY), labels=[False, True]))
    return float(-np.log(np.clip(probabilities[np.arange(len(truth)), truth], _TINY, 1)).mean())


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, *, multilabel: bool) -> float:
    """Expected calibration error over BINS equal bins of confidence, in [0, 1]. Source: Naeini et al. 2015; Guo et al. 2017, section 2."""
    bins = reliability(probabilities, truth, multilabel=multilabel)
    return sum(count * abs(confidence - right) for confidence, right, count in bins) / sum(count for *_, count in bins)


def reliability(probabilities: np.ndarray, truth: np.ndarray, *, multilabel: bool) -> list[tuple[float, float, int]]:
    """(mean confidence, share that is right, count) of each of BINS bins that holds any answer."""
    confidence = probabilities.ravel() if multilabel else probabilities.max(axis=1)
    right = np.asarray(truth).ravel() if multilabel else probabilities.argmax(axis=1) == truth
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        (float(confidence[place == k].mean()), float(right[place == k].mean()), int((place == k).sum()))
        for k in range(BINS)
        if (place == k).any()
    ]


@dataclass(frozen=True)
class RiskCoverage:
    """The most confident answers first. coverage: the share that is answered; risk: the share of those that is wrong; confidence: of the
    least confident of them; area: under the curve, the mean risk over all coverages (AURC: Geifman & El-Yaniv 2017, arXiv:1705.08500)."""

    coverage: np.ndarray
    risk: np.ndarray
    confidence: np.ndarray
    area: float


def risk_coverage(probabilities: np.ndarray, truth: np.ndarray) -> RiskCoverage:
    """Of single-label predictions."""
    return risk_curve(probabilities.max(axis=1), probabilities.argmax(axis=1) != truth)


def risk_curve(confidence: np.ndarray, errors: np.ndarray) -> RiskCoverage:
    """confidence: (N,) of each prediction; errors: (N,) in 0…1 or bool, how wrong each one is."""
    order = np.argsort(-confidence, kind="stable")
    count = np.arange(1, len(order) + 1)
    risk = np.cumsum(errors[order]) / count
    return RiskCoverage(count / len(order), risk, confidence[order], float(risk.mean()))


def abstain_below(probabilities: np.ndarray, truth: np.ndarray, precision: float) -> float:
    """The `lowest_confidence` of single-label predictions."""
    return lowest_confidence(risk_coverage(probabilities, truth), precision)


def lowest_confidence(curve: RiskCoverage, precision: float) -> float:
    """The confidence below which not to answer, so that of what is answered `precision` is right: of such thresholds the lowest. 1, which
    means that nothing is answered, where not even the most confident answers reach it. A threshold lies between two answers, on none."""
    # Answers of one confidence stand or fall together.
    ends = np.r_[curve.confidence[1:] < curve.confidence[:-1], True]
    enough = np.flatnonzero(ends & (1 - curve.risk >= precision))
    if not len(enough):
        return 1.0
    last = enough[-1]
    return float(curve.confidence[last] + curve.confidence[last + 1]) / 2 if last + 1 < len(ends) else 0.0


def mean_interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The LEVEL interval of the mean of `values` (N,) in 0…1, one an image: Wilson's where all are 0 or 1, or all are equal (a bootstrap
    would have no width), else by percentile bootstrap."""
    values = np.asarray(values, np.float64)
    if np.isin(values, (0, 1)).all() or np.ptp(values) == 0:
        low, high = wilson(np.array([values.sum()]), np.array([len(values)]))[0]
        return float(low), float(high)
    distinct, numbers = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), numbers / len(values), size=DRAWS) @ distinct
    low, high = np.percentile(drawn / len(values), [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2])
    return float(low), float(high)


def intervals(truth: np.ndarray, answer: np.ndarray, count: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Intervals (LEVEL): `accuracy` and `macro_f1` (2,), and `precision`, `recall` and `f1` (count, 2) of each class, see
    `refract.pipeline.evaluation.intervals`. truth, answer: (N,) class indices."""
    hits = np.bincount(truth[truth == answer], minlength=count)
    given, real = (np.bincount(indices, minlength=count) for indices in (answer, truth))
    bounds = class_intervals(hits, given, real)
    values = 2 * hits / np.maximum(given + real, 1)
    macro = macro_interval(_drawn_f1(truth, answer, count, seed), values, bounds["f1"])
    return {"accuracy": np.array(mean_interval(truth == answer)), "macro_f1": macro, **bounds}


def _drawn_f1(truth: np.ndarray, answer: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(DRAWS, count): each class's F1 in bootstrap draws of the images, NaN where a draw neither holds nor predicts it."""
    # To draw images with replacement is to draw how often each cell of the confusion matrix is seen.
    cells, numbers = np.unique(truth * count + answer, return_counts=True)
    rows, columns = cells // count, cells % count
    seen = np.random.default_rng(seed).multinomial(len(truth), numbers / len(truth), size=DRAWS).astype(np.float64)
    hits, both = np.zeros((DRAWS, count)), np.zeros((DRAWS, count))
    diagonal = rows == columns
    hits[:, rows[diagonal]] = seen[:, diagonal]
    for indices in (rows, columns):
        np.add.at(both.T, indices, seen.T)
    with np.errstate(invalid="ignore"):
        return 2 * hits / both


@dataclass(frozen=True)
class Difference:
    """Of two classifiers on the same images: the difference of their accuracies, its bootstrap interval, and McNemar's exact p-value."""

    value: float
    low: float
    high: float
    p_value: float


def paired_difference(one: np.ndarray, other: np.ndarray, *, seed: int = 0) -> Difference:
    """one, other: bool (N,), whether each was right. McNemar 1947, by the exact binomial test on the images that only one has right."""
    from scipy.stats import binomtest

    gains = one.astype(int) - other.astype(int)
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    rng = np.random.default_rng(seed)
    shares = np.array([better, worse, len(gains) - better - worse]) / len(gains)
    drawn = rng.multinomial(len(gains), shares, size=DRAWS * 10)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / len(gains), [2.5, 97.5])
    p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return Difference(float(gains.mean()), float(low), float(high), float(p_value))


def likely_label_errors(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Places of images whose label is likely wrong, the likeliest first: some other class is more probable than that class is for its own
    images on average, and more than the label. Source: Northcutt et al. 2021, "Confident learning", arXiv:1911.00068, section 3.1.

    The images must not have been trained on.
    """
    return suspects(probabilities, truth)[0]


def suspects(probabilities: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices as `likely_label_errors`, by how much the other class is more probable than the label)"""
    count = probabilities.shape[1]
    own = np.array([probabilities[truth == c, c].mean() if (truth == c).any() else 2.0 for c in range(count)])
    candidates = np.where(probabilities >= own, probabilities, -1)
    suspect = candidates.argmax(axis=1)
    labelled = probabilities[np.arange(len(truth)), truth]
    margin = candidates.max(axis=1) - labelled
    found = np.flatnonzero((candidates.max(axis=1) > 0) & (suspect != truth) & (margin > 0))
    found = found[np.argsort(-margin[found], kind="stable")]
    return found, margin[found]


_TINY = 1e-12
