"""The store of recent predictions: its bounds, and the estimates from those with feedback."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from refract.models.prediction import confidences, predicted_labels
from refract.serve.errors import RequestError
from refract.serve.feedback.decisions import MultiLabel, SingleLabel
from refract.serve.feedback.live_accuracy import MOST_CLASSES, calibration, live_accuracy
from refract.serve.feedback.recent_predictions import MOST_MODELS, RecentPredictions


def rows_of(labels: list[int]) -> np.ndarray:
    """Probabilities whose most probable labels are `labels`."""
    return np.where(np.arange(10) == np.array(labels)[:, None], 0.55, 0.05).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    keep=st.integers(1, 12),
    events=st.lists(
        st.one_of(
            st.tuples(st.just("predict"), st.integers(0, 5), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
            st.tuples(st.just("judge"), st.integers(0, 5), st.integers(0, 9)),
            st.tuples(st.just("wait"), st.integers(0, 3000), st.just(0)),
        ),
        max_size=40,
    ),
)
def test_the_store_agrees_with_a_plain_list(bundle, keep, events) -> None:
    """The memory stays the same, and the latest `keep` predictions of the latest hour can be judged, no others."""
    now, plain = 0.0, []  # (time, id, index, predicted, truth)
    store = RecentPredictions(bundle.info, keep=keep, hours=1, clock=lambda: now)
    memory = store.bytes
    for kind, number, value in events:
        if kind == "wait":
            now += number
        elif kind == "predict":
            store.record(f"id {number}", bundle, rows_of(value))
            plain = [*plain, *([now, number, index, label, None] for index, label in enumerate(value))][-keep:]
        else:
            fresh = [row for row in plain if row[0] > now - 3600]
            entry = next((row for row in reversed(fresh) if row[1:3] == [number, 0]), None)
            if entry is None:
                with pytest.raises(RequestError, match="no prediction has the id"):
                    store.judge(f"id {number}", [value], 0)
            else:
                judgement = store.judge(f"id {number}", [value], 0)
                assert judgement.predicted == [entry[3]] and judgement.correct == (entry[3] == value)
                assert judgement.replaced == (entry[4] is not None)
                entry[4] = value
        fresh = [row for row in plain if row[0] > now - 3600]
        judged = [row for row in fresh if row[4] is not None]
        assert store.retained() == len(fresh) and store.bytes == memory
        live = store.live()
        assert [model.judged for model in live] == ([len(judged)] if judged else [])
        for model in live:
            assert model.accuracy.value == pytest.approx(np.mean([row[3] == row[4] for row in judged]))


def test_a_prediction_takes_tens_of_bytes(bundle, make_bundle, tmp_path) -> None:
    multilabel = make_bundle(tmp_path / "m", task="multilabel", thresholds=[0.5] * 10)
    for served, most in ((bundle, 40), (multilabel, 40)):
        assert RecentPredictions(served.info, keep=1000, hours=1).bytes <= most * 1000
    many = dataclasses.replace(multilabel.info, labels=tuple(map(str, range(800))), thresholds=(0.5,) * 800)
    assert RecentPredictions(many, keep=1000, hours=1).bytes <= (40 + 2 * 100) * 1000


def test_accuracies_have_wilson_s_intervals_overall_and_by_class() -> None:
    truth = np.repeat([0, 1, 2], [40, 10, 3])
    predicted = np.where(np.arange(53) % 5 == 0, (truth + 1) % 4, truth).astype(np.int32)
    scores = SingleLabel(4).compare(predicted, truth.astype(np.int32))
    live = live_accuracy("d", ("a", "b", "c", "never"), scores, np.full(53, 0.9, np.float32))
    for estimate, rows in (
        (live.accuracy, truth >= 0),
        *((row.accuracy, truth == index) for index, row in enumerate(live.classes)),
    ):
        hits, trials = int((predicted == truth)[rows].sum()), int(rows.sum())
        wilson = binomtest(hits, trials).proportion_ci(method="wilson")
        assert tuple(estimate) == pytest.approx((hits / trials, wilson.low, wilson.high))
    assert [(row.label, row.judged) for row in live.classes] == [("a", 40), ("b", 10), ("c", 3)] and live.judged == 53


def test_calibration_is_confidence_minus_accuracy_with_a_width_also_without_errors() -> None:
    value, low, high = calibration(np.full(20, 0.99, np.float32), np.ones(20))
    assert value == pytest.approx(-0.01) and low <= value and high > 0.05, "twenty right predictions prove little"
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 20_000).astype(np.float32)
    value, low, high = calibration(confidence, (rng.random(20_000) < confidence - 0.1).astype(float))
    assert low < 0.1 < high and high - low < 0.02 and low < value < high


def test_multi_label_predictions_are_compared_as_sets() -> None:
    rng, count = np.random.default_rng(1), 11
    sets, truth = rng.random((5000, count)) < 0.3, rng.random((5000, count)) < 0.3
    truth[::2] = sets[::2]
    codes = MultiLabel(count)
    packed = [
        np.stack([np.frombuffer(codes.encode(np.flatnonzero(row)), np.uint8) for row in rows]) for rows in (sets, truth)
    ]
    scores = codes.compare(*packed)
    np.testing.assert_array_equal(scores.correct, (sets == truth).all(axis=1))
    np.testing.assert_allclose(scores.right, (sets == truth).mean(axis=1))
    np.testing.assert_array_equal(scores.class_judged, truth.sum(axis=0))
    np.testing.assert_array_equal(scores.class_hits, (sets & truth).sum(axis=0))
    assert codes.indices(packed[0][0]) == np.flatnonzero(sets[0]).tolist()


def test_a_multi_label_decision_is_that_of_the_response(make_bundle, tmp_path) -> None:
    info, codes = make_bundle(tmp_path / "m", task="multilabel", thresholds=[0.2, 0.8] * 5).info, MultiLabel(10)
    for served in (info, dataclasses.replace(info, thresholds=(0.6,) * 10)):  # a hot swap may change the thresholds
        for row in np.random.default_rng(2).random((50, 10)).astype(np.float32):
            value, confidence = codes.decide(served, row)
            chosen = predicted_labels(row[None], "multilabel", served.thresholds)[0]
            assert codes.indices(np.frombuffer(value, np.uint8)) == np.flatnonzero(chosen).tolist()
            assert confidence == pytest.approx(confidences(row[None], "multilabel", served.thresholds)[0], abs=1e-6)


def test_few_classes_and_few_models_are_reported(bundle) -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 1000, 50_000).astype(np.int32)
    scores = SingleLabel(1000).compare(truth, truth)
    live = live_accuracy("d", tuple(map(str, range(1000))), scores, np.ones(50_000))
    most = sorted(np.bincount(truth).tolist())[-MOST_CLASSES:]
    assert sorted(row.judged for row in live.classes) == most

    class Version:
        info, digest = bundle.info, ""

    store = RecentPredictions(bundle.info, keep=100, hours=1)
    for number in range(MOST_MODELS + 2):
        Version.digest = str(number)
        store.record(f"{number}", Version, np.eye(10, dtype=np.float32)[:1])
        store.judge(f"{number}", [0])
    assert [model.digest for model in store.live()] == ["4", "3", "2"]
