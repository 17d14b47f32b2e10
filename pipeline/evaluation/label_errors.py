"""Wrong labels told from a model's own errors, by predictions on samples that it was not trained on. Arrays in, numbers out.

probabilities: float (N, C), rows that sum to 1; truth: int (N,) class indices, the labels as they are given.

A model errs where it is unsure. Labels that are wrong by chance contradict it everywhere, also where it is surest, and then with any class
rather than with its second choice. Without one of the two, errors are taken for the model's own.
"""

from dataclasses import dataclass

import numpy as np

from refract.pipeline.evaluation import measures

SUREST = 0.25
"""Fraction of the predictions, the most confident ones, whose contradictions are counted."""

FEWEST, FEWEST_CONTRADICTED = 30, 4
"""Confident predictions, and contradictions among them, from which anything is concluded."""

GOOD_ENOUGH = 0.4
"""A model whose errors are more than this fraction of those of always predicting the commonest class says nothing of labels."""

SECOND_CHOICE = 0.4
"""Fraction of a model's own errors in which the label is its second choice, at least: models on scikit-learn's digits have 0.5 to 0.7."""


@dataclass(frozen=True)
class NoiseEvidence:
    """What `noise_evidence` counts. classes: number of labels; samples: of the predictions; majority: fraction of the commonest label;
    wrong: fraction that contradicts its label; sure, contradicted: of the SUREST predictions, their number and how many contradict their
    label, 0 where confidence orders nothing; doubted, second_choice: of the surer half, contradictions, and those of them whose label is
    the second choice."""

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
        """Whether more labels are wrong than the model's own errors explain, beyond chance."""
        from scipy.stats import binomtest

        if not self.good_enough or self.sure < FEWEST or self.contradicted < FEWEST_CONTRADICTED:
            return False
        fraction = self.contradicted / self.sure
        low = float(binomtest(self.contradicted, self.sure).proportion_ci(method="wilson").low)
        if (
            self.classes < 4
        ):  # any label is the second choice, or nearly so: the errors must hardly fall with confidence
            return low > max(0.03, 0.25 * self.wrong) and fraction > 0.5 * self.wrong
        by_chance = binomtest(self.second_choice, self.doubted, SECOND_CHOICE, alternative="less").pvalue
        return low > 0.03 and fraction > 0.3 * self.wrong and float(by_chance) < 0.02


def noise_evidence(probabilities: np.ndarray, truth: np.ndarray) -> NoiseEvidence:
    """Count. ValueError without samples."""
    if not len(truth):
        raise ValueError("no predictions to look for label noise in")
    samples, classes = probabilities.shape
    confidence, ranked = probabilities.max(axis=1), np.argsort(-probabilities, axis=1)
    wrong = ranked[:, 0] != truth
    sure = confidence >= np.sort(confidence)[-max(1, int(SUREST * samples))]  # with all that are as confident
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
        second_choice=int((ranked[doubted, 1] == truth[doubted]).sum()) if classes > 1 else 0,
    )


def likely_label_errors(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Indices of samples whose label is likely wrong, the likeliest first; none of a model that is not good enough.

    The candidates are those of `measures.likely_label_errors` (Northcutt et al. 2021, arXiv:1911.00068). Where the labels are noisy all of
    them stay; else those at confidences at which at least half of the contradictions exceed the errors that the confidences announce.
    """
    if not len(truth):
        return np.zeros(0, dtype=np.int64)
    evidence = noise_evidence(probabilities, truth)
    if not evidence.good_enough:
        return np.zeros(0, dtype=np.int64)
    candidates = measures.likely_label_errors(probabilities, truth)
    if evidence.is_noise:
        return candidates
    unexplained = _unexplained(probabilities, truth)
    return candidates[unexplained[candidates]]


def _unexplained(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """bool (N,): the longest run of the most confident predictions that has at least twice the contradictions its confidences announce.
    An overconfident model announces too few: its numbers are raised to its errors on all samples."""
    confidence, wrong = probabilities.max(axis=1), probabilities.argmax(axis=1) != truth
    order = np.argsort(-confidence, kind="stable")
    announced = np.cumsum(1 - confidence[order])
    raised = announced * max(1.0, wrong.sum() / max(announced[-1], 1e-9))
    contradicted = np.cumsum(wrong[order])
    ends = np.flatnonzero((raised <= 0.5 * contradicted) & (contradicted > 0))
    unexplained = np.zeros(len(truth), dtype=bool)
    if len(ends):
        unexplained[order[: ends[-1] + 1]] = True
    return unexplained
