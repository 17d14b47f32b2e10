"""Distinguish wrong labels from a model's own errors, by its predictions on samples that it was not trained on.

probabilities: float (N, C), rows sum to 1; truth: int (N,) class indices, the labels to check.

A model errs where it is unsure. Randomly wrong labels contradict it also where it is most confident, and with any class rather than with
its second choice. Labels count as noisy only if both signs are present.
"""

from dataclasses import dataclass

import numpy as np

from refract.pipeline.evaluation import measures

SUREST = 0.25
"""Fraction of the predictions that count as the most confident ones."""

FEWEST, FEWEST_CONTRADICTED = 30, 4
"""Confident predictions, and contradicted ones among them, that a conclusion needs."""

GOOD_ENOUGH = 0.4
"""A model must have less than this fraction of the errors of always predicting the most frequent class to judge labels."""

SECOND_CHOICE = 0.4
"""Least fraction of a model's own errors whose label is its second choice. Models on scikit-learn's digits have 0.5 to 0.7."""


@dataclass(frozen=True)
class NoiseEvidence:
    """The counts of `noise_evidence`.

    classes: number of classes; samples: number of predictions; majority: fraction of the most frequent label; wrong: fraction of the
    predictions that contradict the label; sure: number of the SUREST predictions; contradicted: how many of these contradict the label;
    both are 0 where too many confidences are equal. doubted: contradictions in the more confident half of the predictions; second_choice:
    those of them whose label is the second choice.
    """

    classes: int
    samples: int
    majority: float
    wrong: float
    sure: int
    contradicted: int
    doubted: int
    second_choice: int

    @property
    def good_enough(self) -> bool:
        """Whether the model is good enough to judge labels."""
        return self.wrong < GOOD_ENOUGH * (1 - self.majority)

    @property
    def is_noise(self) -> bool:
        """Whether significantly more labels are contradicted than the model's own errors explain."""
        from scipy.stats import binomtest

        if not self.good_enough or self.sure < FEWEST or self.contradicted < FEWEST_CONTRADICTED:
            return False
        fraction = self.contradicted / self.sure
        low = float(binomtest(self.contradicted, self.sure).proportion_ci(method="wilson").low)
        # With few classes nearly every label is the second choice. There the errors must hardly fall with confidence.
        if self.classes < 4:
            return low > max(0.03, 0.25 * self.wrong) and fraction > 0.5 * self.wrong
        by_chance = binomtest(self.second_choice, self.doubted, SECOND_CHOICE, alternative="less").pvalue
        return low > 0.03 and fraction > 0.3 * self.wrong and float(by_chance) < 0.02


def noise_evidence(probabilities: np.ndarray, truth: np.ndarray) -> NoiseEvidence:
    """Count the contradictions of predictions and labels. Raises ValueError without samples."""
    if not len(truth):
        raise ValueError("label noise needs at least one prediction, got none")
    samples, classes = probabilities.shape
    confidence, predicted = probabilities.max(axis=1), probabilities.argmax(axis=1)
    wrong = predicted != truth
    sure = confidence >= np.sort(confidence)[-max(1, int(SUREST * samples))]  # includes ties
    ordered = sure.sum() <= 2 * SUREST * samples
    half = np.argsort(-confidence, kind="stable")[: samples // 2]
    doubted = half[wrong[half]]
    return NoiseEvidence(
        classes=classes,
        samples=samples,
        majority=float(np.bincount(truth).max() / samples),
        wrong=float(wrong.mean()),
        sure=int(sure.sum()) if ordered else 0,
        contradicted=int(wrong[sure].sum()) if ordered else 0,
        doubted=len(doubted),
        second_choice=_second_choices(probabilities[doubted], truth[doubted]) if classes > 1 else 0,
    )


def _second_choices(probabilities: np.ndarray, truth: np.ndarray) -> int:
    """Count the samples whose label is the second most probable class. probabilities: a copy, which is changed."""
    probabilities[np.arange(len(truth)), probabilities.argmax(axis=1)] = -1
    return int((probabilities.argmax(axis=1) == truth).sum())


def likely_label_errors(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the indices of samples whose label is likely wrong, the likeliest first; none if the model is not good enough.

    The candidates are those of `confident_learning`. If the labels are noisy, all candidates stay. Otherwise those stay whose confidence
    belongs to the range found by `_unexplained`.
    """
    if not len(truth):
        return np.zeros(0, dtype=np.int64)
    evidence = noise_evidence(probabilities, truth)
    if not evidence.good_enough:
        return np.zeros(0, dtype=np.int64)
    candidates, _ = confident_learning(probabilities, truth)
    if evidence.is_noise:
        return candidates
    unexplained = _unexplained(probabilities, truth)
    return candidates[unexplained[candidates]]


def confident_learning(probabilities: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (the indices of samples whose label is suspicious, the likeliest error first; the margin of each).

    For such a sample, another class is more probable than the label, and at least as probable as that class is on average for samples
    with its label. The margin is the difference of the two probabilities.
    Source: Northcutt et al. 2021, "Confident learning", arXiv:1911.00068, section 3.1.
    """
    classes, labelled = probabilities.shape[1], probabilities[np.arange(len(truth)), truth]
    sums, counts = np.bincount(truth, labelled, minlength=classes), np.bincount(truth, minlength=classes)
    mean_own = np.where(counts > 0, sums / np.maximum(counts, 1), 2.0)
    suspect, highest = np.zeros(len(truth), np.int64), np.zeros(len(truth), probabilities.dtype)
    for rows in measures.blocks(probabilities):
        candidates = np.where(probabilities[rows] >= mean_own, probabilities[rows], -1)
        suspect[rows], highest[rows] = candidates.argmax(axis=1), candidates.max(axis=1)
    margin = highest - labelled
    indices = np.flatnonzero((highest > 0) & (suspect != truth) & (margin > 0))
    indices = indices[np.argsort(-margin[indices], kind="stable")]
    return indices, margin[indices]


def _unexplained(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Select the longest run of most confident predictions with at least twice the contradictions that their confidences predict.

    Returns bool (N,). An overconfident model predicts too few errors: these are scaled up to its errors on all samples.
    """
    confidence, wrong = probabilities.max(axis=1), probabilities.argmax(axis=1) != truth
    order = np.argsort(-confidence, kind="stable")
    expected = np.cumsum(1 - confidence[order])
    scaled = expected * max(1.0, wrong.sum() / max(expected[-1], 1e-9))
    contradicted = np.cumsum(wrong[order])
    ends = np.flatnonzero((scaled <= 0.5 * contradicted) & (contradicted > 0))
    unexplained = np.zeros(len(truth), dtype=bool)
    if len(ends):
        unexplained[order[: ends[-1] + 1]] = True
    return unexplained
