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
    return {"what": what, "quality": _quality(evaluation), "next": _next_steps(numbers, notes)[:MOST_STEPS]}


def _quality(evaluation: Evaluation) -> list[str]:
    multilabel = evaluation.truth.ndim == 2
    if multilabel:
        value, bounds = evaluation.metrics["sample_f1"], evaluation.intervals.get("sample_f1")
        sentences = [f"The labels of a sample are predicted with a mean F1 of {value:.1%}{_interval(bounds)}."]
    else:
        value, bounds = evaluation.metrics["accuracy"], evaluation.intervals.get("accuracy")
        most_frequent = np.bincount(evaluation.truth[evaluation.truth >= 0]).max() / len(evaluation.truth)
        sentences = [
            f"{value:.1%} of the predictions are right{_interval(bounds)}. "
            f"Always predicting the most frequent label would give {most_frequent:.1%}."
        ]
    rows = [row for row in evaluation.per_class if row["count"]]
    if len(rows) > 1:
        worst = min(rows, key=lambda row: row["f1"])
        sentences.append(
            f"The weakest label is {worst['label']}: {worst['recall']:.1%} of its {_counted(worst['count'], 'sample')} are found, "
            f"and {worst['precision']:.1%} of its predictions are right."
        )
    if (error := evaluation.metrics.get("calibration_error")) is not None:
        sentences.append(f"The stated confidence differs from the accuracy by {error:.1%} on average.")
    return sentences


def _next_steps(numbers: dict[str, Any], notes: Sequence[str]) -> list[str]:
    steps = [f"{finding['name']}: {finding['cure']}." for finding in numbers["findings"] or []]
    steps += notes
    if errors := len(numbers["likely_label_errors"]):
        steps.append(f"Review {_counted(errors, 'sample')} whose labels are likely wrong, in the gallery below.")
    if pairs := len(numbers.get("near_duplicates", {}).get("pairs", ())):
        steps.append(f"Remove {_counted(pairs, 'near-duplicate')} of training images from the test set.")
    if worse := [f"{part['column']} = {part['value']}" for part in numbers["slices"] if part["worse"]]:
        steps.append(f"Add training samples where the accuracy is low: {', '.join(worse[:3])}.")
    if numbers.get("abstaining", {}).get("abstain_below", 0) >= 1:
        steps.append(
            "Add validation samples: the bundle abstains on every sample, as none reaches the wanted precision."
        )
    return steps or [
        "Serve the bundle (refract serve BUNDLE), or compare it with another run (refract compare RUN OTHER_RUN)."
    ]


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" (95 % interval {bounds[0]:.1%} to {bounds[1]:.1%})"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
