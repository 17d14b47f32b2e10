"""How good a classifier is on labelled images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refract.augment import Preprocess
from refract.models.classifier import Classifier
from refract.models.prediction import confidences, given_labels
from refract.pipeline.data.manifest import DataError, Sample
from refract.pipeline.evaluation import measures
from refract.pipeline.evaluation.multilabel import label_calibration_errors, label_rates, set_errors, set_intervals
from refract.pipeline.inference.scoring import SampleInput, score


@dataclass(frozen=True)
class Evaluation:
    """metrics: name → value; intervals: of some of them, 95 %; per_class: one row a label; confusion: C×C counts, rows the truth, None for
    multilabel; probabilities: N×C float32, truth: (N,) indices or (N, C) bool, and right: (N,) bool, whether the answer, for multilabel
    each of its labels, is true, in the order of the samples; thresholds: one a label for multilabel, else empty."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_class: list[dict[str, Any]]
    confusion: np.ndarray | None
    probabilities: np.ndarray
    truth: np.ndarray
    right: np.ndarray
    samples: Sequence[Sample]
    thresholds: tuple[float, ...] = ()

    @property
    def task(self) -> str:
        return "multilabel" if self.truth.ndim == 2 else "multiclass"

    @property
    def answers(self) -> np.ndarray:
        """(N, C) bool: the labels that each sample is given."""
        return given_labels(self.probabilities, self.task, self.thresholds)

    @property
    def macro_classes(self) -> int:
        """Over how many classes `macro_f1` is the mean: those that are the truth or the prediction of a sample; for multilabel all."""
        if self.task == "multilabel":
            return self.truth.shape[1]
        return len(np.union1d(self.truth, self.probabilities.argmax(axis=1)))

    @property
    def errors(self) -> np.ndarray:
        """(N,) in 0…1: how wrong each answer is: 0 or 1, for multilabel one minus the F1 of the sample's labels."""
        return set_errors(self.answers, self.truth) if self.task == "multilabel" else (~self.right).astype(float)

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
    progress: bool = True,
    tta: str = "none",
) -> Evaluation:
    """Measure on samples whose labels index `labels`. tta: see `refract.pipeline.inference.scoring.views`. DataError
    names an image that cannot be read.

    Accuracy, top-5 accuracy (above five classes), macro F1 (over the classes that are the truth or the prediction of a sample, as
    scikit-learn), negative log likelihood, expected calibration error and the area under the
    risk-coverage curve; for multilabel macro, micro and sample F1, subset accuracy, mean average precision and AUROC over the labels that
    have both kinds of images, likelihood and calibration, a label being given from its threshold (0.5 without thresholds) on.
    """
    given = probabilities_of(
        classifier, preprocess, samples, task=task, temperature=temperature, tta=tta, progress=progress
    )
    if task == "multilabel":
        return _multilabel(given, samples, labels, tuple(thresholds) or (0.5,) * len(labels))
    return _single_label(given, samples, labels)


def probabilities_of(
    classifier: Classifier, preprocess: Preprocess, samples: Sequence[Sample], *, progress: bool = True, **options: Any
) -> np.ndarray:
    """N×C float32, as `refract.pipeline.inference.scoring.score` with its options. DataError names an image that cannot be read."""
    from tqdm import tqdm

    answers = score(classifier, preprocess, [SampleInput(s.read, s.text, s.has_image) for s in samples], **options)
    rows = []
    for sample, answer in zip(
        samples, tqdm(answers, "evaluating", len(samples), disable=not progress or None, leave=False), strict=True
    ):
        if not isinstance(answer, np.ndarray):
            raise DataError(f"{sample.path}: cannot be read: {answer}")
        rows.append(answer)
    return np.stack(rows)


def truth_of(samples: Sequence[Sample], task: str, count: int) -> np.ndarray:
    """(N,) class indices, or for multilabel (N, count) bool."""
    if task != "multilabel":
        return np.array([sample.labels[0] for sample in samples])
    truth = np.zeros((len(samples), count), dtype=bool)
    for row, sample in zip(truth, samples, strict=True):
        row[list(sample.labels)] = True
    return truth


def _single_label(given: np.ndarray, samples: Sequence[Sample], labels: Sequence[str]) -> Evaluation:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    truth, answer = truth_of(samples, "multiclass", len(labels)), given.argmax(1)
    indices = np.arange(len(labels))
    metrics = {"accuracy": accuracy_score(truth, answer)}
    if len(labels) > 5:
        best = np.argsort(-given, axis=1, kind="stable")[:, :5]
        metrics["top5_accuracy"] = (best == truth[:, None]).any(1).mean()
    metrics["macro_f1"] = f1_score(truth, answer, average="macro", zero_division=0)
    metrics["nll"] = measures.nll(given, truth, multilabel=False)
    metrics["calibration_error"] = measures.calibration_error(given, truth, multilabel=False)
    metrics["risk_coverage_area"] = measures.risk_coverage(given, truth).area
    bounds = measures.intervals(truth, answer, len(labels))
    per_class = _per_class(truth[:, None] == indices, answer[:, None] == indices, labels)
    _add_intervals(per_class, bounds)
    return Evaluation(
        _floats(metrics),
        {name: (float(bounds[name][0]), float(bounds[name][1])) for name in ("accuracy", "macro_f1")},
        per_class,
        confusion_matrix(truth, answer, labels=indices),
        given,
        truth,
        answer == truth,
        samples,
    )


def _multilabel(
    given: np.ndarray, samples: Sequence[Sample], labels: Sequence[str], thresholds: tuple[float, ...]
) -> Evaluation:
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth = truth_of(samples, "multilabel", len(labels))
    answer = given_labels(given, "multilabel", thresholds)
    errors, right = set_errors(answer, truth), (answer == truth).all(axis=1)
    seen = truth.any(0)  # average precision is undefined for a label without a positive
    both = seen & ~truth.all(0)
    of_labels, rates = label_calibration_errors(given, truth), label_rates(answer, truth)
    metrics = {
        "macro_f1": rates["f1"].mean(),
        "micro_f1": rates["micro_f1"],
        "sample_f1": 1 - errors.mean(),
        "subset_accuracy": right.mean(),
        "mean_average_precision": average_precision_score(truth[:, seen], given[:, seen], average="macro")
        if seen.any()
        else 0.0,
        "nll": measures.nll(given, truth, multilabel=True),
        "calibration_error": measures.calibration_error(given, truth, multilabel=True),
        "label_calibration_error": of_labels.mean(),
        "risk_coverage_area": measures.risk_curve(confidences(given, "multilabel", thresholds), errors).area,
    }
    if both.any():
        metrics["mean_auroc"] = roc_auc_score(truth[:, both], given[:, both], average="macro")
    bounds = set_intervals(answer, truth)
    intervals = {name: (float(bounds[name][0]), float(bounds[name][1])) for name in ("macro_f1", "micro_f1")}
    intervals |= {"sample_f1": measures.mean_interval(1 - errors), "subset_accuracy": measures.mean_interval(right)}
    per_class = _per_class(truth, answer, labels)
    _add_intervals(per_class, bounds)
    for row, threshold, calibration in zip(per_class, thresholds, of_labels, strict=True):
        row |= {"threshold": threshold, "calibration_error": float(calibration)}
    return Evaluation(_floats(metrics), intervals, per_class, None, given, truth, right, samples, thresholds)


def _add_intervals(per_class: list[dict[str, Any]], bounds: Mapping[str, np.ndarray]) -> None:
    for name in ("precision", "recall", "f1"):
        for row, pair in zip(per_class, bounds[name], strict=True):
            row[f"{name}_interval"] = [float(edge) for edge in pair]


def _per_class(truth: np.ndarray, answer: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    rates = label_rates(answer, truth)
    columns = (rates["precision"], rates["recall"], rates["f1"], truth.sum(axis=0))
    return [
        {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "count": int(n)}
        for label, p, r, f, n in zip(labels, *columns, strict=True)
    ]


def _floats(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
