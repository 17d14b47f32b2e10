"""Metrics of predictions: calibration, confidence intervals, risk and coverage. NumPy arrays in, numbers out.

probabilities: float (N, C), rows sum to 1, for multi-label one independent probability per label.
truth: int (N,) class indices, for multi-label bool (N, C).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refract.models.intervals import LEVEL, wilson
from refract.pipeline.evaluation.intervals import DRAWS, class_intervals, macro_interval

BINS = 15

AT_ONCE = 1 << 20
"""Probabilities that are changed at once, which bounds the memory with many images and classes."""


def fit_temperature(probabilities: np.ndarray, truth: np.ndarray, *, multilabel: bool, given_at: float = 1.0) -> float:
    """Fit the temperature with the highest likelihood, between 1/20 and 20.

    given_at: the temperature of the probabilities; at a high one float32 still distinguishes the most confident predictions.
    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        temperature, total = np.exp(log_temperature) / given_at, 0.0
        for rows in blocks(probabilities):
            block = _at_temperature(probabilities[rows], temperature, multilabel=multilabel)
            total += len(block) * nll(block, truth[rows], multilabel=multilabel)
        return total / len(probabilities)

    bound = np.log(20)
    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x))


def at_temperature(probabilities: np.ndarray, temperature: float, *, multilabel: bool) -> np.ndarray:
    """Return the probabilities, float32 (N, C), with their logits divided by the temperature."""
    changed = np.empty(probabilities.shape, np.float32)
    for rows in blocks(probabilities):
        changed[rows] = _at_temperature(probabilities[rows], temperature, multilabel=multilabel)
    return changed


def _at_temperature(probabilities: np.ndarray, temperature: float, *, multilabel: bool) -> np.ndarray:
    """Return `at_temperature` in float64."""
    from scipy.special import expit, log_softmax, logit

    safe = np.clip(probabilities.astype(np.float64), _TINY, 1 - _TINY if multilabel else 1)
    if multilabel:
        return expit(logit(safe) / temperature)
    return np.exp(log_softmax(np.log(safe) / temperature, axis=1))


def nll(probabilities: np.ndarray, truth: np.ndarray, *, multilabel: bool) -> float:
    """Return the mean negative log likelihood in nats, of the true class, for multi-label of each label."""
    from sklearn.metrics import log_loss

    if multilabel:
        return float(log_loss(truth.ravel(), np.clip(probabilities.ravel(), _TINY, 1 - _TINY), labels=[False, True]))
    return float(-np.log(np.clip(probabilities[np.arange(len(truth)), truth], _TINY, 1)).mean())


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, *, multilabel: bool) -> float:
    """Return the expected calibration error in [0, 1] over BINS equal bins of confidence.

    Source: Naeini et al. 2015; Guo et al. 2017, section 2.
    """
    bins = reliability(probabilities, truth, multilabel=multilabel)
    return sum(count * abs(confidence - right) for confidence, right, count in bins) / sum(count for *_, count in bins)


def reliability(probabilities: np.ndarray, truth: np.ndarray, *, multilabel: bool) -> list[tuple[float, float, int]]:
    """Return (mean confidence, fraction of right predictions, count) for each non-empty bin of BINS."""
    confidence = probabilities.ravel() if multilabel else probabilities.max(axis=1)
    right = np.asarray(truth).ravel() if multilabel else probabilities.argmax(axis=1) == truth
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        (float(confidence[bins == k].mean()), float(right[bins == k].mean()), int((bins == k).sum()))
        for k in range(BINS)
        if (bins == k).any()
    ]


@dataclass(frozen=True)
class RiskCoverage:
    """The risk-coverage curve, which accepts the most confident predictions first.

    coverage: (N,) fraction of accepted predictions; risk: (N,) mean error of these; confidence: (N,) the lowest accepted one; area: under
    the curve, the mean risk over all coverages (AURC: Geifman & El-Yaniv 2017, arXiv:1705.08500).
    """

    coverage: np.ndarray
    risk: np.ndarray
    confidence: np.ndarray
    area: float


def top_accuracy(probabilities: np.ndarray, truth: np.ndarray, count: int) -> float:
    """Return the fraction of samples whose true class is among the `count` most probable ones. Of equal ones, the first class counts."""
    right = 0
    for rows in blocks(probabilities):
        block, true = probabilities[rows], truth[rows]
        of_truth = np.take_along_axis(block, true[:, None], axis=1)
        ahead = block > of_truth
        ahead |= (block == of_truth) & (np.arange(block.shape[1]) < true[:, None])
        right += int(((ahead.sum(axis=1) < count) & ~np.isnan(of_truth[:, 0])).sum())
    return right / len(truth)


def blocks(probabilities: np.ndarray) -> Iterator[slice]:
    """Yield slices of the rows, each of about AT_ONCE probabilities. Temporary arrays of a block take little memory."""
    rows = max(1, AT_ONCE // probabilities.shape[1])
    return (slice(start, start + rows) for start in range(0, len(probabilities), rows))


def risk_coverage(probabilities: np.ndarray, truth: np.ndarray) -> RiskCoverage:
    """Return the risk-coverage curve of single-label predictions."""
    return risk_curve(probabilities.max(axis=1), probabilities.argmax(axis=1) != truth)


def risk_curve(confidence: np.ndarray, errors: np.ndarray) -> RiskCoverage:
    """Return the risk-coverage curve. confidence: (N,) of each prediction; errors: (N,) in 0…1 or bool, of each prediction."""
    order = np.argsort(-confidence, kind="stable")
    count = np.arange(1, len(order) + 1)
    risk = np.cumsum(errors[order]) / count
    return RiskCoverage(count / len(order), risk, confidence[order], float(risk.mean()))


def abstain_below(probabilities: np.ndarray, truth: np.ndarray, precision: float) -> float:
    """Return the `lowest_confidence` of single-label predictions."""
    return lowest_confidence(risk_coverage(probabilities, truth), precision)


def lowest_confidence(curve: RiskCoverage, precision: float) -> float:
    """Return the lowest confidence threshold at which the accepted predictions reach `precision`.

    Returns 1, which accepts nothing, where even the most confident predictions miss `precision`. A threshold lies halfway between two
    confidences, never on one.
    """
    # A threshold accepts or rejects predictions of equal confidence together.
    ends = np.r_[curve.confidence[1:] < curve.confidence[:-1], True]
    enough = np.flatnonzero(ends & (1 - curve.risk >= precision))
    if not len(enough):
        return 1.0
    last = enough[-1]
    return float(curve.confidence[last] + curve.confidence[last + 1]) / 2 if last + 1 < len(ends) else 0.0


def mean_interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Return the LEVEL interval of the mean of `values` (N,) in 0…1, one value per image.

    Wilson's interval where all values are 0 or 1, or equal (a bootstrap would have no width); otherwise a percentile bootstrap.
    """
    values = np.asarray(values, np.float64)
    if np.isin(values, (0, 1)).all() or np.ptp(values) == 0:
        low, high = wilson(np.array([values.sum()]), np.array([len(values)]))[0]
        return float(low), float(high)
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=DRAWS) @ distinct
    low, high = np.percentile(drawn / len(values), [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2])
    return float(low), float(high)


def intervals(truth: np.ndarray, predicted: np.ndarray, count: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the LEVEL intervals of single-label metrics, see `refract.pipeline.evaluation.intervals`.

    `accuracy` and `macro_f1`: (2,); `precision`, `recall` and `f1` of each class: (count, 2). truth, predicted: (N,) class indices.
    """
    hits = np.bincount(truth[truth == predicted], minlength=count)
    given, real = (np.bincount(indices, minlength=count) for indices in (predicted, truth))
    bounds = class_intervals(hits, given, real)
    values = 2 * hits / np.maximum(given + real, 1)
    macro = macro_interval(_drawn_f1(truth, predicted, count, seed), values, bounds["f1"])
    return {"accuracy": np.array(mean_interval(truth == predicted)), "macro_f1": macro, **bounds}


def _drawn_f1(truth: np.ndarray, predicted: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return each class's F1 in bootstrap resamples, (DRAWS, count), NaN where a resample neither has nor predicts the class."""
    # Drawing images with replacement is the same as drawing the counts of the confusion matrix's cells.
    cells, cell_counts = np.unique(truth * count + predicted, return_counts=True)
    rows, columns = cells // count, cells % count
    seen = np.random.default_rng(seed).multinomial(len(truth), cell_counts / len(truth), size=DRAWS).astype(np.float64)
    hits, both = np.zeros((DRAWS, count)), np.zeros((DRAWS, count))
    diagonal = rows == columns
    hits[:, rows[diagonal]] = seen[:, diagonal]
    for indices in (rows, columns):
        np.add.at(both.T, indices, seen.T)
    with np.errstate(invalid="ignore"):
        return 2 * hits / both


@dataclass(frozen=True)
class Difference:
    """The difference of two classifiers' accuracies on the same images, its bootstrap interval, and McNemar's exact p-value."""

    value: float
    low: float
    high: float
    p_value: float


def paired_difference(right: np.ndarray, other_right: np.ndarray, *, seed: int = 0) -> Difference:
    """Return the accuracy of the first classifier minus that of the second.

    right, other_right: bool (N,), whether each prediction is right. The p-value is McNemar's (1947), by the exact binomial test on the
    images that only one classifier predicts right.
    """
    from scipy.stats import binomtest

    gains = right.astype(int) - other_right.astype(int)
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    rng = np.random.default_rng(seed)
    fractions = np.array([better, worse, len(gains) - better - worse]) / len(gains)
    drawn = rng.multinomial(len(gains), fractions, size=DRAWS * 10)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / len(gains), [2.5, 97.5])
    p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return Difference(float(gains.mean()), float(low), float(high), float(p_value))


_TINY = 1e-12
