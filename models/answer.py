"""Probabilities to the JSON of an answer. Knows nothing of requests or engines."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Explanation(NamedTuple):
    """Where the network found evidence for the label. png: the heat map; method: how it was computed. Where there is no map, png is None,
    and code (for programs) and detail (for people) say why."""

    png: bytes | None = None
    method: str = ""
    code: str = ""
    detail: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """The answer's fields."""
        if self.png is None:
            return {"explanation_problem": {"code": self.code, "detail": self.detail}}
        return {"explanation": base64.b64encode(self.png).decode(), "explanation_method": self.method}


def prediction(
    row: np.ndarray,
    labels: Sequence[str],
    *,
    top: int,
    thresholds: Sequence[float] | None,
    abstain_below: float | None = None,
    explanation: Explanation | None = None,
    cut: bool = False,
) -> dict[str, Any]:
    """One picture's answer: its `top` labels, likeliest first.

    row: C probabilities; thresholds: one a label: the answer gains `labels`, those that reach theirs; abstain_below: the answer gains
    `abstain`, whether its confidence lies below it: such an answer should be left to a person. At 1 every answer does; explanation: the
    answer gains its `fields`; cut: the answer gains `text_truncated`.
    """
    # Stable, so that equal probabilities come in the order of the labels, on every machine.
    order = np.argsort(-row, kind="stable")[:top]
    best = [{"label": labels[i], "confidence": float(row[i])} for i in order.tolist()]
    answer: dict[str, Any] = {**best[0], "top": best}
    if thresholds is not None:
        reached = np.flatnonzero(row >= np.asarray(thresholds, dtype=row.dtype))
        answer["labels"] = [labels[i] for i in reached.tolist()]
    if abstain_below is not None:
        answer["abstain"] = abstain_below >= 1 or best[0]["confidence"] < abstain_below
    if explanation is not None:
        answer |= explanation.fields
    if cut:
        answer["text_truncated"] = True
    return answer


def given_labels(probabilities: np.ndarray, task: str, thresholds: Sequence[float] = ()) -> np.ndarray:
    """(N, C) bool: with which labels each of the rows (N, C) is answered; for several those that reach their thresholds, or 0.5."""
    count = probabilities.shape[1]
    if task == "multilabel":
        return probabilities >= np.asarray(thresholds or [0.5] * count, dtype=probabilities.dtype)
    return np.arange(count) == probabilities.argmax(axis=1)[:, None]


def confidences(probabilities: np.ndarray, task: str) -> np.ndarray:
    """(N,): the probability of the label that is answered; for several the mean over all labels of that in what is said of each."""
    if task == "multilabel":
        return np.maximum(probabilities, 1 - probabilities).mean(axis=1)
    return probabilities.max(axis=1, initial=0)


def line(path: Path, answer: dict[str, Any]) -> str:
    """An answer for people."""
    labels = ", ".join(f"{row['label']} {row['confidence']:.1%}" for row in answer["top"])
    unsure = "  (too unsure: leave it to a person)" if answer.get("abstain") else ""
    return f"{path}: {labels}{unsure}" + ("  (the text was cut)" if answer.get("text_truncated") else "")
