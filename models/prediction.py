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
    confidence: float | None = None,
    explanation: Explanation | None = None,
    cut: bool = False,
) -> dict[str, Any]:
    """One image's answer: its `top` labels, likeliest first.

    row: C probabilities; thresholds: one a label: the answer gains `labels`, those that reach theirs; abstain_below: the answer gains
    `abstain`, whether its confidence lies below it: such an answer should be left to a person. At 1 every answer does; confidence: the
    answer's own, see `confidences`; None takes that of the likeliest label; explanation: the answer gains its `fields`; cut: the answer
    gains `text_truncated`.
    """
    # Stable, so that equal probabilities come in the order of the labels, on every machine.
    order = np.argsort(-row, kind="stable")[:top]
    best = [{"label": labels[i], "confidence": float(row[i])} for i in order.tolist()]
    answer: dict[str, Any] = {**best[0], "top": best}
    if thresholds is not None:
        reached = np.flatnonzero(row >= np.asarray(thresholds, dtype=row.dtype))
        answer["labels"] = [labels[i] for i in reached.tolist()]
    if abstain_below is not None:
        sure = best[0]["confidence"] if confidence is None else confidence
        answer["abstain"] = abstain_below >= 1 or sure < abstain_below
    if explanation is not None:
        answer |= explanation.fields
    if cut:
        answer["text_truncated"] = True
    return answer


def given_labels(probabilities: np.ndarray, task: str, thresholds: Sequence[float] = ()) -> np.ndarray:
    """(N, C) bool: with which labels each of the rows (N, C) is answered; for several those that reach their thresholds, or 0.5."""
    count = probabilities.shape[1]
    if task == "multilabel":
        return probabilities >= np.asarray(thresholds if len(thresholds) else [0.5] * count, dtype=probabilities.dtype)
    return np.arange(count) == probabilities.argmax(axis=1)[:, None]


def confidences(probabilities: np.ndarray, task: str, thresholds: Sequence[float] = ()) -> np.ndarray:
    """(N,): how sure each answer is. For one label its probability; for multi-label the mean over all labels of the probability that
    the label is rightly given, or rightly not given."""
    if task == "multilabel":
        given = given_labels(probabilities, task, thresholds)
        return np.where(given, probabilities, 1 - probabilities).mean(axis=1, dtype=np.float64)
    return probabilities.max(axis=1, initial=0)


def line(path: Path, answer: dict[str, Any]) -> str:
    """An answer for people; of a multi-label bundle first the labels that reach their thresholds."""
    labels = ", ".join(f"{row['label']} {row['confidence']:.1%}" for row in answer["top"])
    if "labels" in answer:
        labels = f"{', '.join(answer['labels']) or 'no label'}  ({labels})"
    unsure = "  (too unsure: leave it to a person)" if answer.get("abstain") else ""
    return f"{path}: {labels}{unsure}" + ("  (the text was cut)" if answer.get("text_truncated") else "")
