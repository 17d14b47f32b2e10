"""Calibration, intervals and abstention, on predictions with known metrics."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from refract.pipeline.evaluation import measures


def drawn(temperature: float, count: int = 20_000, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Predictions whose logits are `temperature` times too large, and the truth drawn from the calibrated ones."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1.5, (count, classes))
    honest = softmax(logits, axis=1)
    truth = (honest.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1)
    return softmax(logits * temperature, axis=1), truth


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_and_calibrates(temperature: float) -> None:
    probabilities, truth = drawn(temperature)
    estimate = measures.fit_temperature(probabilities, truth, multilabel=False)
    assert estimate == pytest.approx(temperature, rel=0.05)
    before = measures.calibration_error(probabilities, truth, multilabel=False)
    cooled = measures.at_temperature(probabilities, estimate, multilabel=False)
    after = measures.calibration_error(cooled, truth, multilabel=False)
    assert after < 0.02 and (temperature == 1 or before > 0.08)
    assert (cooled.argmax(1) == probabilities.argmax(1)).all(), "no answer changes"
    assert measures.nll(cooled, truth, multilabel=False) <= measures.nll(probabilities, truth, multilabel=False) + 1e-9


def test_the_temperature_of_multi_label_predictions() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1.5, (8000, 3))
    truth = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    estimate = measures.fit_temperature(1 / (1 + np.exp(-2.5 * logits)), truth, multilabel=True)
    assert estimate == pytest.approx(2.5, rel=0.06)


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_temperature_is_the_same_in_blocks_that_bound_the_memory(
    multilabel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    probabilities = rng.dirichlet(np.ones(4), 101).astype(np.float32)
    truth = rng.random((101, 4)) < probabilities if multilabel else rng.integers(0, 4, 101)
    whole = measures.fit_temperature(probabilities, truth, multilabel=multilabel)
    monkeypatch.setattr(measures, "AT_ONCE", 40)  # ten rows in a block, one in the last
    assert measures.fit_temperature(probabilities, truth, multilabel=multilabel) == pytest.approx(whole, rel=1e-6)


def test_the_calibration_error_equals_a_hand_computed_one() -> None:
    # Ten answers of confidence 0.8, of which six are right: 0.2 off.
    probabilities = np.tile([0.8, 0.2], (10, 1))
    truth = np.array([0] * 6 + [1] * 4)
    assert measures.calibration_error(probabilities, truth, multilabel=False) == pytest.approx(0.2)
    assert measures.reliability(probabilities, truth, multilabel=False) == [(pytest.approx(0.8), 0.6, 10)]


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_calibration_error_is_that_of_torchmetrics(multilabel: bool) -> None:
    import torch
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

    probabilities, truth = drawn(2.0, count=500)
    given, bins = torch.from_numpy(probabilities), measures.BINS
    if multilabel:
        truth = np.random.default_rng(3).random(probabilities.shape) < probabilities**2
        expected = binary_calibration_error(given.flatten(), torch.from_numpy(truth).flatten().long(), n_bins=bins)
    else:
        expected = multiclass_calibration_error(given, torch.from_numpy(truth), num_classes=4, n_bins=bins)
    assert measures.calibration_error(probabilities, truth, multilabel=multilabel) == pytest.approx(float(expected))


def test_risk_and_coverage_equal_hand_computed_ones() -> None:
    confidence = np.array([0.9, 0.8, 0.7, 0.6])
    probabilities = np.stack([confidence, 1 - confidence], 1)
    curve = measures.risk_coverage(probabilities, np.array([0, 1, 0, 1]))
    np.testing.assert_allclose(curve.coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curve.risk, [0, 1 / 2, 1 / 3, 2 / 4])
    assert curve.area == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert measures.abstain_below(probabilities, np.array([0, 1, 0, 1]), 1.0) == pytest.approx(0.85)
    assert measures.abstain_below(probabilities, np.array([0, 1, 0, 1]), 0.6) == pytest.approx(0.65)
    assert measures.abstain_below(probabilities, np.array([0, 1, 0, 1]), 0.5) == 0
    assert measures.abstain_below(probabilities, np.array([1, 1, 1, 1]), 0.9) == 1


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 80), st.floats(0.3, 1.0))
def test_accepted_predictions_reach_the_wanted_precision(seed: int, classes: int, count: int, wanted: float) -> None:
    rng = np.random.default_rng(seed)
    probabilities = np.round(rng.dirichlet(np.ones(classes), count), 1) + 1e-3  # with ties
    truth = rng.integers(0, classes, count)
    threshold = measures.abstain_below(probabilities, truth, wanted)
    answered = probabilities.max(axis=1) >= threshold
    right = probabilities.argmax(axis=1) == truth
    if answered.any() and threshold < 1:
        assert right[answered].mean() >= wanted - 1e-12


RATES = ("precision", "recall", "f1")


def test_intervals_cover_the_truth_at_their_level() -> None:
    rng, held, count = np.random.default_rng(3), 0, 200
    for seed in range(count):
        truth = rng.integers(0, 3, 400)
        answer = np.where(rng.random(400) < 0.8, truth, (truth + 1) % 3)
        low, high = measures.intervals(truth, answer, 3, seed=seed)["accuracy"]
        held += low <= 0.8 <= high
    assert 0.9 < held / count < 0.99
    bounds = measures.intervals(truth, answer, 3)
    assert bounds["precision"].shape == (3, 2) and (bounds["recall"][:, 0] <= bounds["recall"][:, 1]).all()
    assert not np.isnan(measures.intervals(np.array([0, 0]), np.array([0, 0]), 3)["f1"]).any(), (
        "classes without an image"
    )


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    rng = np.random.default_rng(4)
    one = rng.random(2000) < 0.9
    other = one.copy()
    other[rng.choice(np.flatnonzero(one), 40, replace=False)] = False
    difference = measures.paired_difference(one, other)
    assert (
        difference.value == pytest.approx(0.02)
        and 0.01 < difference.low < difference.high < 0.03
        and difference.p_value < 1e-9
    )
    same = measures.paired_difference(one, one)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    # McNemar by hand: 8 against 2 of ten, both tails of the fair coin: 2 · (1 + 10 + 45) / 1024.
    one, other = np.array([True] * 8 + [False] * 2), np.array([False] * 8 + [True] * 2)
    assert measures.paired_difference(one, other).p_value == pytest.approx(2 * 56 / 1024)


def test_the_intervals_of_a_perfect_classifier_hold_its_metrics_and_have_a_width() -> None:
    truth = np.r_[np.zeros(51, int), np.arange(1, 10)]
    bounds = measures.intervals(truth, truth, 10)
    low, high = bounds["macro_f1"]
    assert high == 1 and 0.7 < low < 0.95
    assert (bounds["recall"][:, 1] == 1).all()
    # Wilson's lower end for n of n is n / (n + z²): 51 images, then 1.
    assert bounds["recall"][:2, 0].tolist() == pytest.approx([51 / (51 + 1.96**2), 1 / (1 + 1.96**2)], abs=1e-3)


@pytest.mark.parametrize(("classes", "images", "right"), [(2, 50, 0.98), (3, 60, 0.9), (10, 150, 0.95)])
def test_intervals_of_classes_cover_the_truth_on_small_test_sets(classes: int, images: int, right: float) -> None:
    """The true rates follow from the sampling: all classes alike, errors spread evenly over the other classes."""
    rng, held = np.random.default_rng(0), []
    for seed in range(150):
        truth = rng.integers(0, classes, images)
        answer = np.where(rng.random(images) < right, truth, (truth + rng.integers(1, classes, images)) % classes)
        bounds = measures.intervals(truth, answer, classes, seed=seed)
        held.append([*(np.mean((low <= right) & (right <= high)) for low, high in (bounds[name].T for name in RATES)),
                     bounds["macro_f1"][0] <= right <= bounds["macro_f1"][1]])  # fmt: skip
    *rates, macro = np.mean(held, axis=0)
    # At a rate of 0.98 of 25 images Wilson's interval holds it in nine of ten cases; the bootstrap did in four.
    assert all(0.88 < rate < 0.985 for rate in rates), rates
    assert 0.88 < macro <= 1


def test_the_most_confident_predictions_are_calibrated_too() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1.5, (20_000, 10)).astype(np.float32)
    honest = softmax(logits.astype(np.float64), axis=1)
    truth = (honest.cumsum(axis=1) < rng.random((len(logits), 1))).sum(axis=1)
    soft = softmax(15 * logits / 20, axis=1).astype(
        np.float32
    )  # what a network 15 times too sure says at temperature 20
    estimate = measures.fit_temperature(soft, truth, multilabel=False, given_at=20.0)
    assert estimate == pytest.approx(15, rel=0.05)
    assert (
        measures.calibration_error(
            measures.at_temperature(soft, estimate / 20, multilabel=False), truth, multilabel=False
        )
        < 0.02
    )
