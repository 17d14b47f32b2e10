"""The summary at the top of a report: what was measured, how good and how certain the result is, and what to do next."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from refract.pipeline.evaluation.evaluate import Evaluation

MOST_STEPS = 4
"""Next steps that a summary names."""


def summarized(
    subject: str, evaluation: Evaluation, labels: Sequence[str], numbers: dict[str, Any], notes: Sequence[str]
) -> dict[str, Any]:
    """Return {what, quality, next}: one sentence, some sentences, and a list of sentences.

    subject: the classifier, as the start of a sentence; numbers: the other numbers of the report; notes: see `make_report`.
    """
    count = len(evaluation.samples)
    what = f"{subject} was measured on {_counted(count, 'sample')} with {_counted(len(labels), 'label')}."
    return {"what": what, "quality": _quality(evaluation), "next": _next_steps(evaluation, numbers, notes)[:MOST_STEPS]}


def _quality(evaluation: Evaluation) -> list[str]:
    multilabel = evaluation.truth.ndim == 2
    if multilabel:
        value, bounds = evaluation.metrics["sample_f1"], evaluation.intervals.get("sample_f1")
        sentences = [f"The labels of a sample are predicted with a mean F1 of {value:.1%}{_interval(bounds)}."]
    else:
        value, bounds = evaluation.metrics["accuracy"], evaluation.intervals.get("accuracy")
        sentences = [
            f"{value:.1%} of the predictions are right{_interval(bounds)}. "
            f"Always predicting the most frequent label would give {_most_frequent(evaluation):.1%}."
        ]
    rows = [row for row in evaluation.per_class if row["count"]]
    if len(rows) > 1 and (worst := min(rows, key=lambda row: row["f1"]))["f1"] < 1:
        sentences.append(
            f"The weakest label is {worst['label']}, with {_counted(worst['count'], 'sample')}: {worst['recall']:.1%} of these are found, "
            f"and {worst['precision']:.1%} of the predictions of this label are right."
        )
    if (error := evaluation.metrics.get("calibration_error")) is not None:
        sentences.append(f"The stated confidence differs from the accuracy by {error:.1%} on average.")
    return sentences


def _most_frequent(evaluation: Evaluation) -> float:
    """Return the fraction of the samples that have the most frequent label."""
    return float(np.bincount(evaluation.truth).max() / len(evaluation.truth))


def _is_useless(evaluation: Evaluation) -> bool:
    """Whether neither the accuracy nor the macro F1 exceeds that of the most frequent label, on samples with different labels. With one of
    them alone a classifier of imbalanced labels is useful."""
    if evaluation.task == "multilabel" or (fraction := _most_frequent(evaluation)) == 1:
        return False
    macro_f1 = 2 * fraction / (1 + fraction) / len(np.unique(evaluation.truth))
    return evaluation.metrics["accuracy"] <= fraction and evaluation.metrics["macro_f1"] <= macro_f1 + 1e-9


def _next_steps(evaluation: Evaluation, numbers: dict[str, Any], notes: Sequence[str]) -> list[str]:
    steps = [f"{finding['name']}: {finding['cure']}." for finding in numbers["findings"] or []]
    if _is_useless(evaluation):
        steps.insert(0, "Do not serve this bundle: it is no better than always predicting the most frequent label.")
    steps += notes
    if errors := len(numbers["likely_label_errors"]):
        steps.append(f"Review {_counted(errors, 'sample')} whose labels are likely wrong, in the gallery below.")
    if pairs := len(numbers.get("near_duplicates", {}).get("pairs", ())):
        steps.append(f"Remove {_counted(pairs, 'near-duplicate')} of training images from the test set.")
    if worse := [f"{part['column']} = {part['value']}" for part in numbers["slices"] if part["worse"]]:
        steps.append(f"Add training samples where the accuracy is low: {', '.join(worse[:3])}.")
    if numbers.get("abstaining", {}).get("abstain_below", 0) >= 1:
        what = (
            "abstains on every sample, and predicts parents only, as no class"
            if predicts_parents(numbers)
            else "abstains on every sample, as none"
        )
        steps.append(f"Add validation samples: the bundle {what} reaches the wanted precision.")
    return steps or [
        "Serve the bundle (refract serve BUNDLE), or compare it with another run (refract compare RUN OTHER_RUN)."
    ]


def predicts_parents(numbers: dict[str, Any]) -> bool:
    """Return whether the bundle predicts parents of classes. numbers: the numbers of a report."""
    return numbers.get("back_off", {}).get("threshold", 1) < 1


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" (95 % interval {bounds[0]:.1%} to {bounds[1]:.1%})"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
