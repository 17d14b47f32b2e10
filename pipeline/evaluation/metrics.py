"""The metrics of an evaluation. A further one is a function here and an entry in METRICS.

Independent of scikit-learn until a metric is computed, so that a server may load plugins with metrics.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from refract.models.prediction import confidences, predicted_labels
from refract.pipeline.evaluation import measures
from refract.pipeline.evaluation.multilabel import label_calibration_errors, label_rates, set_errors


@dataclass(frozen=True)
class LabelledPredictions:
    """Predictions of N labelled samples for C labels, and what several metrics read from them.

    probabilities: (N, C) float32; truth: (N,) class indices, or (N, C) bool for multi-label; thresholds: one per label for multi-label.
    """

    probabilities: np.ndarray
    truth: np.ndarray
    thresholds: Sequence[float] = ()

    @property
    def multilabel(self) -> bool:
        return self.truth.ndim == 2

    @cached_property
    def labels(self) -> np.ndarray:
        """The predictions, in the form of the truth."""
        if self.multilabel:
            return predicted_labels(self.probabilities, "multilabel", self.thresholds)
        return self.probabilities.argmax(1)

    @cached_property
    def right(self) -> np.ndarray:
        """(N,) bool: whether the prediction is right, for multi-label in all labels."""
        equal = np.asarray(self.labels == self.truth)
        return np.asarray(equal.all(axis=1)) if self.multilabel else equal

    @cached_property
    def errors(self) -> np.ndarray:
        """(N,) in 0…1: the error of each prediction, see `refract.pipeline.evaluation.multilabel.set_errors`."""
        return set_errors(self.labels, self.truth) if self.multilabel else (~self.right).astype(float)

    @cached_property
    def rates(self) -> dict[str, np.ndarray]:
        """Precision, recall and F1 of each label, for multi-label."""
        return label_rates(self.labels, self.truth)

    @cached_property
    def label_calibration_errors(self) -> np.ndarray:
        """(C,): the calibration error of each label, for multi-label."""
        return label_calibration_errors(self.probabilities, self.truth)

    @cached_property
    def seen(self) -> np.ndarray:
        """(C,) bool: the labels with positives, for multi-label. Average precision is undefined for the others."""
        return np.asarray(self.truth.any(axis=0))


class Metric(NamedTuple):
    """compute: predictions → the value, or None if it is undefined for them; task: `single`, `multilabel` or `any`; fraction: in 0…1."""

    compute: Callable[[LabelledPredictions], float | None]
    task: str = "any"
    fraction: bool = True


def top5_accuracy(given: LabelledPredictions) -> float | None:
    """For more than five classes."""
    if given.probabilities.shape[1] <= 5:
        return None
    return measures.top_accuracy(given.probabilities, given.truth, 5)


def macro_f1(given: LabelledPredictions) -> float:
    """The mean over all labels for multi-label, else over the classes that are true or predicted for a sample, as scikit-learn does."""
    if given.multilabel:
        return given.rates["f1"].mean()
    from sklearn.metrics import f1_score

    return f1_score(given.truth, given.labels, average="macro", zero_division=0)


def mean_average_precision(given: LabelledPredictions) -> float:
    """The mean over the labels with positives; 0 without any."""
    from sklearn.metrics import average_precision_score

    if not given.seen.any():
        return 0.0
    return average_precision_score(given.truth[:, given.seen], given.probabilities[:, given.seen], average="macro")


def mean_auroc(given: LabelledPredictions) -> float | None:
    """The mean over the labels with positives and negatives."""
    from sklearn.metrics import roc_auc_score

    both = given.seen & ~given.truth.all(axis=0)
    if not both.any():
        return None
    return roc_auc_score(given.truth[:, both], given.probabilities[:, both], average="macro")


def risk_coverage_area(given: LabelledPredictions) -> float:
    """The area under the risk-coverage curve."""
    if given.multilabel:
        return measures.risk_curve(confidences(given.probabilities, "multilabel", given.thresholds), given.errors).area
    return measures.risk_coverage(given.probabilities, given.truth).area


def nll(given: LabelledPredictions) -> float:
    """The negative log likelihood."""
    return measures.nll(given.probabilities, given.truth, multilabel=given.multilabel)


def calibration_error(given: LabelledPredictions) -> float:
    """The expected calibration error."""
    return measures.calibration_error(given.probabilities, given.truth, multilabel=given.multilabel)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "accuracy": Metric(lambda given: given.right.mean(), "single"),
        "top5_accuracy": Metric(top5_accuracy, "single"),
        "macro_f1": Metric(macro_f1),
        "micro_f1": Metric(lambda given: float(given.rates["micro_f1"]), "multilabel"),
        "sample_f1": Metric(lambda given: 1 - given.errors.mean(), "multilabel"),
        "subset_accuracy": Metric(lambda given: given.right.mean(), "multilabel"),
        "mean_average_precision": Metric(mean_average_precision, "multilabel"),
        "nll": Metric(nll, fraction=False),
        "calibration_error": Metric(calibration_error),
        "label_calibration_error": Metric(lambda given: given.label_calibration_errors.mean(), "multilabel"),
        "risk_coverage_area": Metric(risk_coverage_area),
        "mean_auroc": Metric(mean_auroc, "multilabel"),
    }
)
"""Name → metric, in the order of reports."""


def measured_metrics(given: LabelledPredictions) -> dict[str, float]:
    """Compute the metrics of the predictions' task that are defined for them."""
    task = "multilabel" if given.multilabel else "single"
    values = {name: metric.compute(given) for name, metric in METRICS.items() if metric.task in (task, "any")}
    return {name: float(value) for name, value in values.items() if value is not None}
