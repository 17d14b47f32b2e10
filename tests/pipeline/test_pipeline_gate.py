"""What the gate asks of two sets of answers, each demand on both its sides: what passes, and what just does not."""

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from refract.augment import Preprocess
from refract.models.bundle.bundle import Bundle, BundleInfo, GoldenSample, load_bundle, save_bundle
from refract.models.classifier import probabilities
from refract.models.factory import make_classifier
from refract.pipeline.config.retraining_sections import GateConfig
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.retraining.gate import Line, Measured, Verdict, _latency, judge, measure
from refract.pipeline.retraining.holdout_size import LARGEST, SMALLEST, Z, lowest_gain, rounded, samples_to_decide


def encoded(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def holdout(*counts: int) -> Manifest:
    """So many samples of each class."""
    samples = [
        Sample(path=f"{c}-{i}", labels=(c,), split="test") for c, count in enumerate(counts) for i in range(count)
    ]
    return Manifest("h", tuple(samples), tuple(f"c{c}" for c in range(len(counts))), "multiclass")


def answers(manifest: Manifest, *wrong: int, calibration: float = 0.0, error: float | None = None) -> Measured:
    """All right but for the samples at these places, which get no answer."""
    right = np.ones(len(manifest.samples), bool)
    right[list(wrong)] = False
    given = np.zeros((len(right), len(manifest.labels)), bool)
    given[np.arange(len(right)), [s.labels[0] for s in manifest.samples]] = right
    return Measured(right, given, calibration, error)


def judged(manifest: Manifest, new: Measured, old: Measured | None, **config: Any) -> dict[str, Line]:
    return {line.name: line for line in judge(GateConfig(**config), manifest, new, old)}


def failed(lines: dict[str, Line]) -> set[str]:
    return {name for name, line in lines.items() if not line.passed}


def test_the_interval_is_judged_by_its_lower_end() -> None:
    held = holdout(50, 50)
    new, old = answers(held, 0, 1, 50), answers(held, 2, 51, 52)
    line = judged(held, new, old, lowest_gain=-0.03)["interval"]
    assert judged(held, new, old)["margin"].value == 0
    assert line.value is not None
    assert line.value < -0.03
    assert not line.passed, "equal on these samples, and perhaps worse"
    assert judged(held, new, old, lowest_gain=-0.1)["interval"].passed


def test_a_better_challenger_on_a_small_holdout_passes_by_default_and_the_size_is_reported() -> None:
    """Of 120 images 8 only the challenger has right, 6 only the champion: the interval reaches below -3 %."""
    held = holdout(60, 60)
    new, old = answers(held, *range(6)), answers(held, *range(60, 68))
    line = judged(held, new, old)["interval"]
    assert line.passed and line.bound == -0.05 and "lower end at least -0.05, from 120 samples" in line.summary
    line = judged(held, new, old, lowest_gain=-0.03)["interval"]
    assert not line.passed and line.bound == -0.03, "a value of the config counts"
    line = judged(held, new, old, lowest_gain=0.0)["interval"]
    assert not line.passed
    assert line.needed == samples_to_decide(8, 6, 120, 0.0)
    assert f"120 samples cannot decide it, about {rounded(line.needed):,} would" in line.summary


def test_a_decided_line_names_no_size() -> None:
    held = holdout(200, 200)
    new, old = answers(held, *range(60)), answers(held)
    lines = judged(held, new, old)
    assert not lines["margin"].passed and lines["margin"].needed is None and "decide" not in lines["margin"].summary
    assert not lines["interval"].passed and lines["interval"].needed is None
    equal = judged(held, answers(held, 0, 1), answers(held, 2, 3))["margin"]
    assert equal.passed and equal.needed is None and "400 samples cannot decide it" in equal.summary, "no size does"


@given(st.integers(1, 10**7), st.integers(1, 10**7))
def test_the_default_bound_is_stricter_on_larger_holdouts(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert -LARGEST <= lowest_gain(small) <= lowest_gain(large) <= -SMALLEST


@given(st.integers(0, 300), st.integers(0, 300), st.integers(600, 5000), st.floats(-0.05, 0.05))
def test_the_reported_size_is_the_first_whose_interval_excludes_the_bound(
    better: int, worse: int, count: int, bound: float
) -> None:
    gain = (better - worse) / count
    assume(abs(gain - bound) > 1e-6 and better + worse > 0)
    variance = (better + worse) / count - gain**2
    needed = samples_to_decide(better, worse, count, bound)
    assert needed is not None
    assert Z * np.sqrt(variance / needed) <= abs(gain - bound) * (1 + 1e-9)
    assert needed == 1 or Z * np.sqrt(variance / (needed - 1)) > abs(gain - bound) * (1 - 1e-9)
    assert needed <= rounded(needed) <= 1.1 * needed


def test_a_gain_at_the_bound_is_decided_by_no_size() -> None:
    assert samples_to_decide(3, 3, 100, 0.0) is None
    assert samples_to_decide(3, 2, 100, 0.01) is None


@pytest.mark.parametrize(("lost", "passes"), [(5, True), (6, False)])
def test_a_fall_is_chance_up_to_the_exact_test_and_holm(lost: int, passes: bool) -> None:
    """Of two classes 5 lost samples have p = 2 / 32, 6 have 2 / 64."""
    held = holdout(40, 40)
    lines = judged(held, answers(held, *range(lost)), answers(held))
    assert ("recall c0" not in lines) == passes
    assert judged(held, answers(held, *range(lost)), answers(held), recall_loss=0.2).get("recall c0") is None, "it may"


def test_a_rare_class_that_is_lost_fails_all_the_same() -> None:
    held = holdout(100, 5)
    old = answers(held, 100, 101)
    lines = judged(held, answers(held, *range(100, 105)), old)
    assert lines["recall c1"].value == 0
    assert not lines["recall c1"].passed, "three right answers became none"
    assert "recall c1" not in judged(held, answers(held, *range(100, 104)), old), "one is left"
    assert "recall c1" not in judged(held, answers(held, *range(100, 105)), answers(held, 100, 101, 102)), "of two"


@pytest.mark.slow
def test_equals_pass_however_many_classes_there_are() -> None:
    """As many errors at other places, 100 classes of 50 samples: without Holm 62 % of such challengers fail at some class."""
    held, rng = holdout(*[50] * 100), np.random.default_rng(0)
    for _ in range(20):
        new, old = (answers(held, *np.flatnonzero(rng.random(5000) < 0.1)) for _ in range(2))
        assert not {name for name in failed(judged(held, new, old)) if name.startswith("recall")}


def test_a_class_without_a_sample_in_the_holdout_fails_the_gate() -> None:
    held = holdout(3, 0)
    line = judged(held, answers(held), None)["recall c1"]
    assert line.passed is False and line.summary == "the holdout has no sample of it"


def test_robustness_and_latency_fail_above_their_bounds() -> None:
    held = holdout(10)
    old = answers(held, error=0.2)
    for error, passes in ((0.29, True), (0.31, False)):
        line = judged(held, answers(held, error=error), old, robustness_loss=0.1)["robustness"]
        assert line.passed == passes
        assert line.value == pytest.approx(error - 0.2)
    for took, passes in ((3.9, True), (4.1, False)):
        line = _latency(GateConfig(latency_ratio=2.0), [took, 2.0])[1]
        assert (line.value, line.passed) == (pytest.approx(took / 2), passes)


@pytest.mark.parametrize(("count", "passes"), [(99, True), (100, False)])
def test_calibration_is_judged_from_a_hundred_samples_on(count: int, passes: bool) -> None:
    held = holdout(count)
    line = judged(held, answers(held, calibration=0.3), None)["calibration_error"]
    assert line.passed == passes
    assert ("not judged on 99 samples" in line.summary) == passes
    assert judged(held, answers(held, calibration=0.14), None)["calibration_error"].passed


def test_an_unknown_line_fails_nothing_and_is_not_printed_as_passed() -> None:
    unknown, passed = Line("holdout", None, None, None, "?"), Line("labels", None, None, True, "all")
    verdict = Verdict((unknown, passed), "h", 9)
    assert verdict.passed and verdict.text() == "unknown  holdout  ?\npassed   labels   all"
    assert not Verdict((unknown, replace(passed, passed=False)), "h", 9).passed


@pytest.fixture(scope="module")
def multilabel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[bytes], np.ndarray]:
    """A bundle for two labels with thresholds far from 0.5, 12 images, and their probabilities (12, 2)."""
    torch.manual_seed(0)
    preprocess = Preprocess(16, 16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    network = {"name": "mlp", "image_size": [16, 16], "args": {}}
    classifier = make_classifier(network, 2, mean=preprocess.mean, std=preprocess.std).eval()
    rng = np.random.default_rng(0)
    images = [encoded(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(12)]
    batch = torch.from_numpy(np.stack([preprocess(data) for data in images])).permute(0, 3, 1, 2)
    with torch.no_grad():
        given = probabilities(classifier(batch), task="multilabel", temperature=1.0).numpy()
    thresholds = tuple(float(np.sort(column)[6]) for column in given.T)
    assert min(abs(threshold - 0.5) for threshold in thresholds) > 0.01, "else one half would do as well"
    info = BundleInfo(
        name="m", task="multilabel", labels=("a", "b"), network=network, preprocess=preprocess.to_dict(),
        thresholds=thresholds, created="2025-01-01T00:00:00+00:00",
    )  # fmt: skip
    golden = GoldenSample("00.png", images[0], tuple(given[0].tolist()))
    folder = save_bundle(tmp_path_factory.mktemp("gate") / "b", info, classifier, [golden])
    return load_bundle(folder), images, given


def labelled(images: list[bytes], truth: np.ndarray) -> Manifest:
    """The images with the labels of truth, bool (N, 2)."""
    samples = [
        Sample(f"{i}", tuple(np.flatnonzero(row).tolist()), "test", data=data)
        for i, (row, data) in enumerate(zip(truth, images, strict=True))
    ]
    return Manifest("h", tuple(samples), ("a", "b"), "multilabel")


def test_a_multilabel_bundle_is_measured_by_its_own_thresholds(
    multilabel: tuple[Bundle, list[bytes], np.ndarray],
) -> None:
    """The labels follow the bundle's thresholds: a threshold of 0.5 would predict other labels."""
    bundle, images, given = multilabel
    truth = given >= np.array(bundle.info.thresholds, np.float32)
    assert measure(bundle, labelled(images, truth), False).right.all()


def test_the_error_under_corruptions_uses_the_thresholds_of_the_bundle(
    multilabel: tuple[Bundle, list[bytes], np.ndarray],
) -> None:
    """A bundle that predicts no label is wrong on each image that has both labels."""
    bundle, images, given = multilabel
    assert given.max() < 0.9 and (given > 0.5).any()
    bundle = replace(bundle, info=replace(bundle.info, thresholds=(0.99, 0.99)))
    assert measure(bundle, labelled(images, np.ones_like(given, bool)), True).error == 1
