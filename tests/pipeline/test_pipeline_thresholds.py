"""Thresholds of multi-label classifiers: never worse on validation than 0.5, and at the target if any threshold reaches it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score

from refract.pipeline.evaluation.thresholds import HIGHEST, LOWEST, choose_thresholds

Validation = tuple[np.ndarray, np.ndarray]


@st.composite
def validations(draw: st.DrawFn) -> Validation:
    """Predictions of a classifier that is better than chance, with ties, and labels that may be rare, absent or everywhere."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    count, labels = draw(st.integers(1, 60)), draw(st.integers(1, 4))
    truth = rng.random((count, labels)) < rng.choice([0.0, 0.05, 0.3, 0.8, 1.0], labels)
    logits = rng.normal(0, 1.5, truth.shape) + draw(st.floats(0, 4)) * truth + draw(st.floats(-8, 8))
    probabilities = 1 / (1 + np.exp(-np.round(logits, draw(st.integers(0, 3)))))
    return probabilities.astype(np.float32), truth


def answers(validation: Validation, aim, target: float = 0.9) -> np.ndarray:
    probabilities, truth = validation
    chosen = choose_thresholds(probabilities, truth, aim=aim, target=target).values
    assert len(chosen) == truth.shape[1] and all(LOWEST <= value <= HIGHEST for value in np.asarray(chosen, np.float32))
    assert np.float32(chosen).tolist() == list(chosen), "float32 and float64 comparisons agree"
    return probabilities >= np.float32(chosen)


def reachable(probabilities: np.ndarray, truth: np.ndarray, rate) -> float:
    """Return the best precision or recall of any threshold that separates the images."""
    cuts = [value for value in np.unique(probabilities)[1:] if LOWEST * 2 < value < HIGHEST]
    return max((rate(truth, probabilities >= cut, zero_division=0) for cut in cuts), default=0.0)


@settings(max_examples=80)
@given(validations())
def test_no_label_has_a_lower_f1_than_at_one_half(validation: Validation) -> None:
    probabilities, truth = validation
    chosen = answers(validation, "f1")
    for k in range(truth.shape[1]):
        half = f1_score(truth[:, k], probabilities[:, k] >= 0.5, zero_division=0)
        assert f1_score(truth[:, k], chosen[:, k], zero_division=0) >= half - 1e-9


@settings(max_examples=80)
@given(validations(), st.sampled_from(["precision", "recall"]), st.floats(0.3, 1.0))
def test_the_target_is_met_where_any_threshold_meets_it(validation: Validation, aim, target: float) -> None:
    probabilities, truth = validation
    rate = precision_score if aim == "precision" else recall_score
    given_ = answers(validation, aim, target)
    missed = choose_thresholds(probabilities, truth, aim=aim, target=target).missed
    for k in range(truth.shape[1]):
        if reachable(probabilities[:, k], truth[:, k], rate) >= target:
            assert rate(truth[:, k], given_[:, k], zero_division=0) >= target - 1e-9
        met = rate(truth[:, k], given_[:, k], zero_division=0) >= target
        assert (k in missed) == (not met and bool(truth[:, k].any()))


def well_separated(count: int, positives: int, low: float, high: float) -> Validation:
    rng = np.random.default_rng(0)
    truth = (np.arange(count) < positives)[:, None]
    return np.where(truth, rng.uniform(high, 1, (count, 1)), rng.uniform(0, low, (count, 1))).astype(np.float32), truth


@pytest.mark.parametrize("aim", ["f1", "precision", "recall"])
def test_a_frequent_label_gets_its_own_threshold_and_a_rare_one_that_of_all(aim) -> None:
    many, truth = well_separated(400, 200, 0.1, 0.2)  # separable at 0.15
    few = many.copy()
    few_truth = np.zeros_like(truth)
    chosen = choose_thresholds(np.hstack([many, few]), np.hstack([truth, few_truth]), aim="f1", target=0.9).values
    assert 0.1 < chosen[0] < 0.2
    alone = choose_thresholds(many, truth, aim=aim, target=0.9).values[0]
    assert (many[:, 0] >= alone).mean() == pytest.approx(0.5, abs=0.06)


def test_one_lucky_positive_does_not_move_a_threshold_far() -> None:
    """Label 1 has one positive, at 0.07. A threshold of 0.5 separates all other labels."""
    rng = np.random.default_rng(1)
    truth = rng.random((200, 6)) < 0.4
    probabilities = np.where(truth, rng.uniform(0.4, 1, truth.shape), rng.uniform(0, 0.6, truth.shape))
    truth[:, 1], probabilities[:, 1] = False, rng.uniform(0, 0.06, 200)
    truth[0, 1], probabilities[0, 1] = True, 0.07
    values = choose_thresholds(probabilities.astype(np.float32), truth, aim="f1", target=0.9).values
    others = [value for place, value in enumerate(values) if place != 1]
    assert all(0.35 < value < 0.65 for value in others) and values[1] > 0.3


def test_fixed_and_missing_validation_data_give_one_half() -> None:
    probabilities, truth = well_separated(20, 5, 0.1, 0.2)
    assert choose_thresholds(probabilities, truth, aim="fixed", target=0.9).values == (0.5,)
    assert choose_thresholds(probabilities[:0], truth[:0], aim="f1", target=0.9).values == (0.5,)


def test_an_inseparable_label_is_missed() -> None:
    truth = np.arange(100)[:, None] % 10 == 0
    chosen = choose_thresholds(np.full((100, 1), 0.3, np.float32), truth, aim="precision", target=0.9)
    assert chosen.missed == (0,) and chosen.values == (0.5,)
