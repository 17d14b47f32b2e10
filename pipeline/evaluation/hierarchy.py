"""Measure predictions in a class hierarchy: accuracy by level, the height of errors, and the predictions that back off to a parent."""

from dataclasses import replace
from typing import Any

import numpy as np

from refract.models.hierarchy import NO_NODE, Hierarchy
from refract.pipeline.evaluation import measures
from refract.pipeline.evaluation.evaluate import Evaluation

LEVEL_ACCURACY = "accuracy_level_"
"""The metric of a level is this name and the number of the level."""

_DIGITS = 12
"""The decimal places of probabilities: sums of the same classes in another order differ in later ones."""

LEAST = 0.5
"""The lowest threshold of an inner node: at most one of several nodes without a common class is more probable than this."""

_BELOW_LEAST = float(np.nextafter(LEAST, 0))
"""A node of exactly LEAST reaches the threshold LEAST."""

LCA_HEIGHT = "lca_height"
"""The metric with the mean height of the lowest common ancestor of the true and the predicted class, over the errors. Source: Bertinetto et
al. 2020, "Making better mistakes", arXiv:1912.09393, section 4 (the hierarchical distance of a mistake)."""


def with_levels(evaluation: Evaluation, hierarchy: Hierarchy | None) -> Evaluation:
    """Return the evaluation with the metrics of the hierarchy, their intervals and `hierarchy`; unchanged without one.

    LEVEL_ACCURACY for each level that groups classes: the fraction of predictions whose ancestor at that level is right. LCA_HEIGHT, if
    there are errors.
    """
    if hierarchy is None:
        return evaluation
    metrics, intervals = dict(evaluation.metrics), dict(evaluation.intervals)
    predicted = evaluation.probabilities.argmax(axis=1)
    for level in _levels(hierarchy):
        nodes = hierarchy.lineage[:, level - 1]
        right = nodes[predicted] == nodes[evaluation.truth]
        metrics[f"{LEVEL_ACCURACY}{level}"] = float(right.mean())
        intervals[f"{LEVEL_ACCURACY}{level}"] = measures.mean_interval(right)
    wrong = ~evaluation.right
    if wrong.any():
        heights = hierarchy.common_heights(evaluation.truth[wrong], predicted[wrong])
        highest = 1 + int(hierarchy.heights.max())
        low, high = measures.mean_interval(heights / highest)
        metrics[LCA_HEIGHT], intervals[LCA_HEIGHT] = float(heights.mean()), (low * highest, high * highest)
    return replace(evaluation, metrics=metrics, intervals=intervals, hierarchy=hierarchy)


def _levels(hierarchy: Hierarchy) -> list[int]:
    """Return the levels at which some classes, but not all, have one ancestor."""
    count = len(hierarchy.labels)
    distinct = [len(np.unique(nodes)) for nodes in hierarchy.lineage.T]
    return [level for level, number in enumerate(distinct, start=1) if 1 < number < count]


def back_off_threshold(
    hierarchy: Hierarchy, probabilities: np.ndarray, truth: np.ndarray, class_threshold: float, precision: float
) -> float:
    """Return the lowest threshold, at least LEAST, at which the predicted inner nodes reach `precision` (see `Hierarchy.answers`).

    probabilities: (N, C) on the validation set; truth: (N,) class indices. A node is right if the true class is below it. Returns 1, which
    accepts nothing, where no threshold reaches `precision`, and where the classes of all samples are accepted. A threshold above LEAST lies
    halfway between two probabilities, as `refract.pipeline.evaluation.measures.lowest_confidence`.
    """
    probabilities = np.asarray(probabilities, np.float64)
    unsure = (probabilities.max(axis=1) < class_threshold) | (class_threshold >= 1)
    low, high, right = _predicted_between(hierarchy, probabilities[unsure], truth[unsure])
    values = np.unique(high)
    # A node counts at each threshold in (low, high]: between two neighbouring values nothing changes.
    starts, ends = np.searchsorted(values, low, side="right"), np.searchsorted(values, high, side="right")
    changes = np.zeros((2, len(values) + 1))
    for row, weights in zip(changes, (np.ones(len(right)), right.astype(float)), strict=True):
        np.add.at(row, starts, weights)
        np.add.at(row, ends, -weights)
    predicted, correct = changes.cumsum(axis=1)[:, : len(values)]
    enough = np.flatnonzero(correct >= precision * predicted - 1e-9)
    if not len(enough):
        return 1.0
    first = enough[0]
    return float(values[first - 1] + values[first]) / 2 if first else LEAST


def _predicted_between(
    hierarchy: Hierarchy, probabilities: np.ndarray, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (low, high, right) of each inner node that is predicted for a sample at the thresholds in (low, high], from LEAST on. A sample
    has several: the higher the threshold, the less specific the node that reaches it."""
    reached = np.full(len(truth), _BELOW_LEAST)
    parts = []
    values = hierarchy.probabilities(probabilities)
    group_sizes = hierarchy.sizes[hierarchy.groups]
    for size in np.unique(group_sizes):
        nodes = hierarchy.groups[group_sizes == size]
        best = nodes[values[:, nodes].argmax(axis=1)]
        value = values[np.arange(len(truth)), best].round(_DIGITS)
        rows = np.flatnonzero(value > reached)
        parts.append((reached[rows], value[rows], hierarchy.contains(best[rows], truth[rows])))
        reached = np.maximum(reached, value)
    low, high, right = (np.concatenate(column) for column in zip(*parts, strict=True))
    return low, high, right


def back_off_numbers(
    evaluation: Evaluation, hierarchy: Hierarchy, class_threshold: float, threshold: float
) -> dict[str, Any]:
    """Return how the predictions back off, as JSON values. class_threshold, threshold: see `Hierarchy.answers`.

    `class_threshold`, `threshold`; `coverage`: fraction of samples with a predicted node; `precision`: fraction of these that are right,
    None without any, with its `interval`; `answers`: the same for the classes (level null) and for the inner nodes of each level.
    """
    nodes = hierarchy.answers(evaluation.probabilities, class_threshold, threshold)
    right = hierarchy.contains(nodes, evaluation.truth)
    inner = nodes >= len(hierarchy.labels)
    rows = [_answered(right, (nodes != NO_NODE) & ~inner) | {"level": None}]
    levels = np.where(inner, hierarchy.levels[nodes], 0)
    rows += [
        _answered(right, levels == level) | {"level": level}
        for level in np.unique(hierarchy.levels[hierarchy.groups])[::-1].tolist()
    ]
    thresholds = {"class_threshold": class_threshold, "threshold": threshold}
    return {**thresholds, **_answered(right, nodes != NO_NODE), "answers": rows}


def _answered(right: np.ndarray, which: np.ndarray) -> dict[str, Any]:
    if not which.any():
        return {"coverage": 0.0, "count": 0, "precision": None, "interval": None}
    bounds = list(measures.mean_interval(right[which]))
    return {
        "coverage": float(which.mean()), "count": int(which.sum()), "precision": float(right[which].mean()), "interval": bounds
    }  # fmt: skip


def back_off_metrics(numbers: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of `back_off_numbers`: `back_off_coverage` and, if there are predictions, `back_off_precision`."""
    metrics = {"back_off_coverage": numbers["coverage"], "back_off_precision": numbers["precision"]}
    return {name: value for name, value in metrics.items() if value is not None}


def back_off_lines(numbers: dict[str, Any]) -> list[str]:
    """Return `back_off_numbers` as lines of text."""
    lines = []
    for row in (numbers, *numbers["answers"]):
        what = "in all" if row is numbers else "classes" if row["level"] is None else f"parents of level {row['level']}"
        quality = (
            ""
            if row["precision"] is None
            else ", {:.4f} right (95 % interval {:.4f} to {:.4f})".format(row["precision"], *row["interval"])
        )
        lines.append(f"predicted {what}: {row['coverage']:.4f} of the samples{quality}")
    return lines
