"""Evaluate a classifier on labelled samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from refract.augment import Preprocess
from refract.models.classifier import Classifier
from refract.models.hierarchy import Hierarchy
from refract.models.prediction import confidences, predicted_labels
from refract.pipeline.data.manifest import DataError, Sample
from refract.pipeline.evaluation import measures
from refract.pipeline.evaluation.confusion import Confusion
from refract.pipeline.evaluation.custom_metrics import custom_metrics
from refract.pipeline.evaluation.metrics import LabelledPredictions, measured_metrics
from refract.pipeline.evaluation.multilabel import rates, set_errors, set_intervals
from refract.pipeline.inference.scoring import SampleInput, score
from refract.progress import tracked


class Predictions(NamedTuple):
    """probabilities: (N, C) float32; truth: (N,) class indices, or (N, C) bool for multi-label; both in the order of the samples."""

    samples: Sequence[Sample]
    probabilities: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """The metrics and predictions of an evaluation.

    metrics: name → value; intervals: name → 95 % interval, for some of the metrics; per_class: one row per label; confusion: None for
    multi-label; thresholds: one per label for multi-label, else empty; hierarchy: the hierarchy of
    the labels, see `refract.pipeline.evaluation.hierarchy.with_levels`.
    In the order of the samples: probabilities: (N, C) float32; truth: (N,) class indices, or (N, C) bool for multi-label; right: (N,)
    bool, whether the prediction is right, for multi-label in all labels.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_class: list[dict[str, Any]]
    confusion: Confusion | None
    probabilities: np.ndarray
    truth: np.ndarray
    right: np.ndarray
    samples: Sequence[Sample]
    thresholds: tuple[float, ...] = ()
    hierarchy: Hierarchy | None = None

    @property
    def task(self) -> str:
        return "multilabel" if self.truth.ndim == 2 else "multiclass"

    @property
    def predicted(self) -> np.ndarray:
        """(N, C) bool: the predicted labels of each sample."""
        return predicted_labels(self.probabilities, self.task, self.thresholds)

    @property
    def macro_classes(self) -> int:
        """The number of classes in the mean of `macro_f1`: those that are true or predicted for a sample; for multi-label all."""
        if self.task == "multilabel":
            return self.truth.shape[1]
        return len(np.union1d(self.truth, self.probabilities.argmax(axis=1)))

    @property
    def errors(self) -> np.ndarray:
        """(N,) in 0…1: the error of each prediction, 0 or 1; for multi-label one minus the F1 of the sample's labels."""
        return set_errors(self.predicted, self.truth) if self.task == "multilabel" else (~self.right).astype(float)

    @property
    def confidences(self) -> np.ndarray:
        """(N,) in 0…1, see `refract.models.prediction.confidences`."""
        return confidences(self.probabilities, self.task, self.thresholds)


def evaluate(
    classifier: Classifier,
    preprocess: Preprocess,
    samples: Sequence[Sample],
    *,
    task: str,
    labels: Sequence[str],
    temperature: float = 1.0,
    thresholds: Sequence[float] = (),
    tta: str = "none",
) -> Evaluation:
    """Evaluate a classifier on samples whose labels index `labels`.

    tta: see `refract.pipeline.inference.scoring.views`. Raises DataError with the path of an unreadable image.

    The metrics are those of `refract.pipeline.evaluation.metrics.METRICS` for the task, then those of plugins. For multi-label, a label is
    predicted if its probability reaches its threshold, 0.5 by default.
    """
    probabilities = probabilities_of(classifier, preprocess, samples, task=task, temperature=temperature, tta=tta)
    return measured(probabilities, samples, task=task, labels=labels, thresholds=thresholds)


def measured(
    probabilities: np.ndarray,
    samples: Sequence[Sample],
    *,
    task: str,
    labels: Sequence[str],
    thresholds: Sequence[float] = (),
) -> Evaluation:
    """Evaluate predictions, as `evaluate`. probabilities: (N, C) float32, in the order of the samples."""
    truth = truth_of(samples, task, len(labels))
    if task == "multilabel":
        given = LabelledPredictions(probabilities, truth, tuple(thresholds) or (0.5,) * len(labels))
        return _multilabel(given, samples, labels)
    return _single_label(LabelledPredictions(probabilities, truth), samples, labels)


def probabilities_of(
    classifier: Classifier, preprocess: Preprocess, samples: Sequence[Sample], **options: Any
) -> np.ndarray:
    """Return the probabilities (N, C) float32. options: of `refract.pipeline.inference.scoring.score`.

    Raises DataError with the path of an unreadable image.
    """
    outcomes = score(classifier, preprocess, [SampleInput(s.read, s.text, s.has_image) for s in samples], **options)
    rows = []
    for sample, outcome in zip(samples, tracked(outcomes, "evaluating", len(samples), unit="samples"), strict=True):
        if not isinstance(outcome, np.ndarray):
            raise DataError(f"{sample.path}: cannot be read: {outcome}")
        rows.append(outcome)
    return np.stack(rows)


def truth_of(samples: Sequence[Sample], task: str, count: int) -> np.ndarray:
    """Return the true labels: class indices (N,), or bool (N, count) for multi-label."""
    if task != "multilabel":
        return np.array([sample.labels[0] for sample in samples])
    truth = np.zeros((len(samples), count), dtype=bool)
    for row, sample in zip(truth, samples, strict=True):
        row[list(sample.labels)] = True
    return truth


def _single_label(given: LabelledPredictions, samples: Sequence[Sample], labels: Sequence[str]) -> Evaluation:
    truth, predicted = given.truth, given.labels
    bounds = measures.intervals(truth, predicted, len(labels))
    hits, predictions, real = (
        np.bincount(values, minlength=len(labels)) for values in (truth[truth == predicted], predicted, truth)
    )
    per_class = _per_class(rates(hits, predictions, real), real, labels)
    _add_intervals(per_class, bounds)
    return Evaluation(
        measured_metrics(given) | custom_metrics(given.probabilities, truth),
        {name: (float(bounds[name][0]), float(bounds[name][1])) for name in ("accuracy", "macro_f1")},
        per_class,
        Confusion.of(truth, predicted, len(labels)),
        given.probabilities,
        truth,
        given.right,
        samples,
    )


def _multilabel(given: LabelledPredictions, samples: Sequence[Sample], labels: Sequence[str]) -> Evaluation:
    truth, predicted, thresholds = given.truth, given.labels, tuple(given.thresholds)
    bounds = set_intervals(predicted, truth)
    intervals = {name: (float(bounds[name][0]), float(bounds[name][1])) for name in ("macro_f1", "micro_f1")}
    intervals |= {
        "sample_f1": measures.mean_interval(1 - given.errors),
        "subset_accuracy": measures.mean_interval(given.right),
    }
    per_class = _per_class(given.rates, truth.sum(axis=0), labels)
    _add_intervals(per_class, bounds)
    for row, threshold, calibration in zip(per_class, thresholds, given.label_calibration_errors, strict=True):
        row |= {"threshold": threshold, "calibration_error": float(calibration)}
    values = measured_metrics(given) | custom_metrics(given.probabilities, truth)
    return Evaluation(values, intervals, per_class, None, given.probabilities, truth, given.right, samples, thresholds)


def _add_intervals(per_class: list[dict[str, Any]], bounds: Mapping[str, np.ndarray]) -> None:
    for name in ("precision", "recall", "f1"):
        for row, pair in zip(per_class, bounds[name], strict=True):
            row[f"{name}_interval"] = [float(edge) for edge in pair]


def _per_class(scores: Mapping[str, np.ndarray], counts: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """scores: `precision`, `recall` and `f1` (C,); counts: (C,) numbers of samples."""
    columns = (scores["precision"], scores["recall"], scores["f1"], counts)
    return [
        {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "count": int(n)}
        for label, p, r, f, n in zip(labels, *columns, strict=True)
    ]
