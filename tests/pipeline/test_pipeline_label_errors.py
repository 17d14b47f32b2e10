"""Wrong labels are distinguished from a model's own errors, simulated on scikit-learn's digits with weak and good models."""

from functools import cache

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from refract.pipeline.evaluation.label_errors import confident_learning, likely_label_errors, noise_evidence

SEEDS = range(8)


@cache
def predictions(seed: int, noise: float, *, blur: float, training: int, strength: float) -> tuple[np.ndarray, ...]:
    """(probabilities, labels as given, true labels) of 500 test digits by a logistic regression. noise: fraction of all labels that is
    replaced by another class; blur: deviation of noise on the pixels, which makes a model weak."""
    draw = np.random.default_rng(seed)
    images, truth = load_digits(return_X_y=True)
    pixels = images / 16 + draw.normal(0, blur, images.shape)
    given = np.where(draw.random(len(truth)) < noise, (truth + draw.integers(1, 10, len(truth))) % 10, truth)
    order = draw.permutation(len(truth))
    known, unseen = order[:training], order[-500:]
    model = LogisticRegression(C=strength, max_iter=30, tol=1e-2).fit(pixels[known], given[known])
    return model.predict_proba(pixels[unseen]), given[unseen], truth[unseen]


WEAK = {"blur": 0.6, "training": 800, "strength": 1.0}
MIDDLING = {"blur": 0.3, "training": 400, "strength": 1.0}
GOOD = {"blur": 0.0, "training": 1200, "strength": 0.05}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("model", [WEAK, MIDDLING, GOOD], ids=["weak", "middling", "good"])
def test_clean_labels_are_not_called_noisy(model: dict[str, float]) -> None:
    for seed in SEEDS:
        probabilities, given, _ = predictions(seed, 0.0, **model)
        assert not noise_evidence(probabilities, given).is_noise, seed


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("noise", [0.1, 0.2])
def test_noise_is_found_by_a_good_model_and_its_list_holds_the_wrong_labels(noise: float) -> None:
    evidence = []
    for seed in SEEDS:
        probabilities, given, truth = predictions(seed, noise, **GOOD)
        evidence.append(noise_evidence(probabilities, given).is_noise)
        listed = likely_label_errors(probabilities, given)
        if evidence[-1]:
            assert (given != truth)[listed].mean() > 0.75 and len(listed) > 0.5 * (given != truth).sum()
    assert sum(evidence) >= 7, evidence


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_weak_models_confident_errors_are_not_called_wrong_labels() -> None:
    """Confident learning alone lists more than a hundred of 500 clean labels, by a model that errs in four of ten."""
    for seed in SEEDS:
        probabilities, given, _ = predictions(seed, 0.0, **WEAK)
        assert len(confident_learning(probabilities, given)[0]) > 60
        assert not len(likely_label_errors(probabilities, given))
        probabilities, given, _ = predictions(seed, 0.0, **GOOD)
        assert len(likely_label_errors(probabilities, given)) <= 6


def test_a_few_wrong_labels_are_listed_where_the_model_is_sure_and_right() -> None:
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 4, 400)
    logits = draw.normal(0, 1, (400, 4))
    logits[np.arange(400), truth] += 8
    given = truth.copy()
    swapped = draw.choice(400, 4, replace=False)
    given[swapped] = (truth[swapped] + 1) % 4
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert set(swapped) == set(likely_label_errors(probabilities, given))
    candidates, margins = confident_learning(probabilities, given)
    assert set(swapped) <= set(candidates) and len(candidates) <= 6
    rows = probabilities[candidates]
    np.testing.assert_allclose(margins, rows.max(axis=1) - rows[np.arange(len(rows)), given[candidates]])
    assert (np.diff(margins) <= 0).all(), "the likeliest error first"
    assert not len(likely_label_errors(probabilities[:0], given[:0]))


def test_few_predictions_and_equal_confidences_give_no_conclusion() -> None:
    truth = np.r_[np.zeros(20, int), np.ones(20, int)]
    sure = np.where(truth[:, None] == [0, 1], 0.99, 0.01)
    given = truth.copy()
    given[::7] = 1 - given[::7]
    assert not noise_evidence(sure[:40], given).is_noise, "10 predictions are the surest quarter"
    flat = np.where(truth[:, None] == [0, 1], 0.6, 0.4)
    assert noise_evidence(np.tile(flat, (10, 1)), np.tile(given, 10)).sure == 0, "all are as sure as each other"
