"""Metrics with classes that are absent from the data, and charts of labels with long names."""

import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.metrics import f1_score

from refract.pipeline.data.manifest import Sample
from refract.pipeline.evaluation import metrics
from refract.pipeline.evaluation.confusion import Confusion
from refract.pipeline.evaluation.custom_metrics import ELSEWHERE, register_metric
from refract.pipeline.evaluation.evaluate import Evaluation, measured
from refract.pipeline.evaluation.plots import confusion_of, save, short
from refract.pipeline.evaluation.report import make_report
from refract.plugins import PluginError

LABELS = ("a", "b", "c", "d")
PNG = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()


def evaluation(truth: list[int], answers: list[int]) -> Evaluation:
    given = np.full((len(truth), len(LABELS)), 0.1, np.float32)
    given[np.arange(len(truth)), answers] = 0.7
    samples = [Sample(f"{i}.png", (label,), "test", data=PNG) for i, label in enumerate(truth)]
    return measured(given, samples, task="multiclass", labels=LABELS)


def test_a_metric_is_an_entry_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    new = metrics.Metric(lambda given: float((given.labels == 3).mean()), "single")
    monkeypatch.setattr(metrics, "METRICS", {**metrics.METRICS, "of_d": new, "sets": new._replace(task="multilabel")})
    result = evaluation([0, 1], [0, 3])
    assert result.metrics["of_d"] == 0.5 and "sets" not in result.metrics and "top5_accuracy" not in result.metrics


@pytest.mark.parametrize("name", [*metrics.METRICS, *ELSEWHERE, "accuracy_level_1"])
def test_a_plugins_metric_cannot_replace_one_of_refract(name: str) -> None:
    with pytest.raises(PluginError, match=f"the metric '{name}' exists already"):
        register_metric(name, lambda probabilities, truth: 0.0)


def test_macro_f1_is_over_the_classes_that_occur_as_in_scikit_learn() -> None:
    truth, answers = [0, 0, 1, 1], [0, 0, 1, 2]
    result = evaluation(truth, answers)
    assert result.metrics["macro_f1"] == pytest.approx(f1_score(truth, answers, average="macro", zero_division=0))
    assert result.metrics["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3), "d neither occurs nor is predicted"
    assert result.macro_classes == 3 and len(result.per_class) == 4


def test_the_report_names_the_number_of_classes_in_macro_f1() -> None:
    facts = {"facts": {}, "precision": 0.95, "abstain_below": None}
    numbers = make_report("r", evaluation([0, 1], [0, 2]), LABELS, **facts).numbers
    assert numbers["macro_f1_classes"] == 3 and "mean over 3 of 4 classes" in numbers["notes"][0]
    assert make_report("r", evaluation([0, 1, 2, 3], [0] * 4), LABELS, **facts).numbers["notes"] == []


@pytest.mark.usefixtures("drawn_charts")
def test_long_labels_are_shortened_in_charts_without_a_warning(tmp_path: Path) -> None:
    labels = [f"{'a very long name of a class ' * 12}{i}" for i in range(5)]
    assert len({short(label) for label in labels}) == 5 and all(len(short(label)) <= 28 for label in labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(confusion_of(Confusion.of(np.arange(5), np.arange(5), 5), labels), tmp_path / "c.png")
        save(confusion_of(Confusion.of(np.arange(2), np.arange(2), 2), labels[:2]), tmp_path / "d.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_the_report_opens_with_what_was_measured_how_good_it_is_and_what_to_do(tmp_path: Path) -> None:
    facts = {"facts": {}, "precision": 0.95, "abstain_below": None}
    result = evaluation([0, 0, 0, 1], [0, 0, 0, 0])
    subject = "The network cnn, trained on 80 samples,"
    report = make_report("r", result, LABELS, subject=subject, notes=["Too few images."], **facts)
    summary = report.numbers["summary"]
    assert summary["what"] == "The network cnn, trained on 80 samples, was measured on 4 samples with 4 labels."
    quality = " ".join(summary["quality"])
    assert "75.0% of the predictions are right (95 % interval " in quality
    assert "Always predicting the most frequent label would give 75.0%." in quality
    assert "The weakest label is b, with 1 sample: 0.0% of these are found" in quality
    assert summary["next"] == [
        "Do not serve this bundle: it is no better than always predicting the most frequent label.", "Too few images."
    ]  # fmt: skip
    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.index("was measured on 4 samples") < page.index("What to do next") < page.index("<h2>Metrics</h2>")
    perfect = make_report("r", evaluation([0, 1, 2, 3], [0, 1, 2, 3]), LABELS, **facts).numbers["summary"]
    assert "weakest" not in " ".join(perfect["quality"])
    rare = make_report("r", evaluation([0] * 8 + [1], [0] * 7 + [1, 1]), LABELS, **facts).numbers["summary"]
    assert not any("Do not serve" in step for step in rare["next"]), (
        "the accuracy is 8/9 too, but the rare label is found"
    )
    alike = make_report("r", evaluation([1, 1], [1, 1]), LABELS, **facts).numbers["summary"]
    assert (
        perfect["next"]
        == alike["next"]
        == ["Serve the bundle (refract serve BUNDLE), or compare it with another run (refract compare RUN OTHER_RUN)."]
    )
