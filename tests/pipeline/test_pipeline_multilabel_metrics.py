"""Multi-label predictions as sets of labels: errors, intervals, labels that are likely wrong."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score

from refract.models.prediction import confidences, format_prediction, prediction
from refract.pipeline.evaluation import measures
from refract.pipeline.evaluation.multilabel import (
    label_calibration_errors,
    label_rates,
    likely_wrong_labels,
    set_errors,
    set_intervals,
)


def test_the_error_of_a_set_equals_a_hand_computed_one() -> None:
    answers = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]], bool)
    truth = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]], bool)
    assert set_errors(answers, truth).tolist() == [0.5, 0, 1, 0]
    assert set_errors(answers, truth, np.array([0, 1, 0, 1])).tolist() == pytest.approx([0.5, 1, 1, 1 / 3])


@given(st.integers(0, 1000))
def test_the_set_error_is_scikit_learns_and_for_one_label_the_error_rate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    answers, truth = (rng.random((2, 20, 4)) < 0.4) | (np.arange(4) == 0)
    assert 1 - set_errors(answers, truth).mean() == pytest.approx(f1_score(truth, answers, average="samples"))
    one, other = np.eye(3, dtype=bool)[rng.integers(3, size=(2, 20))]
    assert set_errors(one, other).tolist() == (one != other).any(axis=1).tolist()


@pytest.mark.parametrize("labels", [1, 4])
def test_the_rates_of_each_label(labels: int) -> None:
    answers, truth = np.random.default_rng(0).random((2, 50, labels)) < 0.4
    rates = label_rates(answers, truth)
    for k in range(labels):
        assert rates["f1"][k] == pytest.approx(f1_score(truth[:, k], answers[:, k]))
        assert rates["precision"][k] == pytest.approx(precision_score(truth[:, k], answers[:, k]))
        assert rates["recall"][k] == pytest.approx(recall_score(truth[:, k], answers[:, k]))
    assert rates["micro_f1"] == pytest.approx(f1_score(truth.ravel(), answers.ravel()))


def test_intervals_contain_the_metric_and_narrow_with_more_images() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for count in (50, 800):
        truth = rng.random((count, 3)) < (0.5, 0.3, 0.2)
        answers = truth ^ (rng.random(truth.shape) < 0.1)
        intervals = set_intervals(answers, truth)
        for average in ("macro", "micro"):
            low, high = intervals[f"{average}_f1"]
            assert low < f1_score(truth, answers, average=average) < high
        assert intervals["precision"].shape == (3, 2)
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    never = set_intervals(np.zeros((4, 2), bool), np.zeros((4, 2), bool))
    assert not any(np.isnan(values).any() for values in never.values())
    absent = np.zeros((len(truth), 1), bool)  # a label that no image has counts 0 in the metric
    low, high = set_intervals(np.hstack([answers, absent]), np.hstack([truth, absent]))["macro_f1"]
    assert low < label_rates(answers, truth)["f1"].sum() / 4 < high < 0.75
    right = set_intervals(truth[:20], truth[:20])
    assert all(right[name][0] < 1 == right[name][1] for name in ("micro_f1", "macro_f1"))


def test_the_interval_of_a_mean_has_a_width_where_all_values_are_equal() -> None:
    low, high = measures.mean_interval(np.ones(10))
    assert low == pytest.approx(0.722, abs=0.001) and high == 1
    low, high = measures.mean_interval(np.array([0.5]))
    assert low < 0.2 and high > 0.8, "one image gives a wide interval"
    low, high = measures.mean_interval(np.linspace(0, 1, 101))
    assert 0.4 < low < 0.5 < high < 0.6


def test_the_calibration_error_of_each_label() -> None:
    truth = np.array([[1, 0]] * 6 + [[0, 0]] * 4, bool)
    errors = label_calibration_errors(np.tile([0.8, 0.1], (10, 1)), truth)
    assert errors.tolist() == pytest.approx([0.2, 0.1])


def test_missing_and_extra_labels_are_found() -> None:
    rng = np.random.default_rng(5)
    truth = rng.random((1000, 3)) < 0.3
    probabilities = 1 / (1 + np.exp(-(rng.normal(0, 1, truth.shape) + np.where(truth, 4, -4))))
    stored = truth.copy()
    flipped = {
        (int(i), int(k)) for i, k in zip(rng.choice(1000, 30, replace=False), rng.integers(3, size=30), strict=True)
    }
    for place in flipped:
        stored[place] ^= True
    wrong_labels = likely_wrong_labels(probabilities, stored)
    right = [wrong for wrong in wrong_labels if (wrong.image, wrong.label) in flipped]
    assert len(right) >= 17 and len(wrong_labels) - len(right) <= 3
    assert all((wrong.kind == "missing") == truth[wrong.image, wrong.label] for wrong in right)
    assert {wrong.kind for wrong in right} == {"missing", "extra"}


def test_confidence_is_that_of_the_predicted_set() -> None:
    probabilities = np.array([[0.3, 0.1]], np.float32)
    assert confidences(probabilities, "multilabel", (0.2, 0.5))[0] == pytest.approx((0.3 + 0.9) / 2)
    assert confidences(probabilities, "multilabel", ())[0] == pytest.approx((0.7 + 0.9) / 2)


def test_the_line_of_a_multi_label_prediction_starts_with_its_labels() -> None:
    row, labels = np.array([0.65, 0.5, 0.35]), ("red", "green", "blue")
    answer = prediction(row, labels, top=3, thresholds=(0.6, 0.45, 0.4))
    assert format_prediction(Path("a.png"), answer) == "a.png: red, green  (red 65.0%, green 50.0%, blue 35.0%)"
    assert (
        format_prediction(Path("a.png"), prediction(row, labels, top=1, thresholds=(0.9,) * 3))
        == "a.png: no label  (red 65.0%)"
    )
