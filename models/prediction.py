"""Predictions as JSON: labels, confidences and explanations from probabilities. Independent of requests and engines."""

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refract.models.hierarchy import BackOff

LOW_CONFIDENCE, UNFAMILIAR = "low_confidence", "unfamiliar"
"""The codes of `abstain_reasons`."""

_SHOWN = {LOW_CONFIDENCE: "low confidence", UNFAMILIAR: "unlike the training images"}


class Explanation(NamedTuple):
    """A heat map of the network's evidence for a label, or the reason why it is missing.

    png: the encoded heat map, None if it is missing; method: the algorithm; code and detail: the reason, for programs and for people.
    """

    png: bytes | None = None
    method: str = ""
    code: str = ""
    detail: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that the explanation adds to a prediction."""
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
    familiarity: float = math.nan,
    min_familiarity: float | None = None,
    backed_off: BackOff | None = None,
    explanation: Explanation | None = None,
    cut: bool = False,
) -> dict[str, Any]:
    """Build the JSON object of one sample's prediction: its `top` most probable labels, in descending order.

    - row: (C,) probabilities
    - thresholds: one for each label; adds `labels`, the labels whose probability reaches the threshold
    - abstain_below: adds `abstain`, whether the confidence lies below this limit, so that a person should decide; always true at 1; if it
      is true, `abstain_reasons` lists the codes
    - familiarity: in 0…1, adds `familiarity`; NaN adds none
    - min_familiarity: adds `abstain`, also true if the familiarity lies below this limit or is NaN
    - backed_off: the ancestor that is certain enough where the label is not, see `Hierarchy.back_offs`; adds `backed_off`, and leaves
      `abstain` as it is for the label
    - confidence: the prediction's confidence, see `confidences`; None takes the probability of the first label
    - explanation: adds its `fields`
    - cut: adds `text_truncated`
    """
    # A stable sort keeps the order of the labels for equal probabilities, on every machine.
    order = np.argsort(-row, kind="stable")[:top]
    best = [{"label": labels[i], "confidence": float(row[i])} for i in order.tolist()]
    result: dict[str, Any] = {**best[0], "top": best}
    if thresholds is not None:
        reached = np.flatnonzero(row >= np.asarray(thresholds, dtype=row.dtype))
        result["labels"] = [labels[i] for i in reached.tolist()]
    if not math.isnan(familiarity):
        result["familiarity"] = familiarity
    if backed_off is not None:
        result["backed_off"] = backed_off.fields
    if abstain_below is not None or min_familiarity is not None:
        confidence = best[0]["confidence"] if confidence is None else confidence
        reasons = _reasons(confidence, abstain_below, familiarity, min_familiarity)
        result["abstain"] = bool(reasons)
        if reasons:
            result["abstain_reasons"] = reasons
    if explanation is not None:
        result |= explanation.fields
    if cut:
        result["text_truncated"] = True
    return result


def _reasons(
    confidence: float, abstain_below: float | None, familiarity: float, min_familiarity: float | None
) -> list[str]:
    """Return the codes of the reasons to abstain."""
    reasons = []
    if abstain_below is not None and (abstain_below >= 1 or confidence < abstain_below):
        reasons.append(LOW_CONFIDENCE)
    if min_familiarity is not None and not familiarity >= min_familiarity:  # also when it is NaN
        reasons.append(UNFAMILIAR)
    return reasons


def predicted_labels(probabilities: np.ndarray, task: str, thresholds: Sequence[float] = ()) -> np.ndarray:
    """Decide the predicted labels from probabilities (N, C). Returns (N, C) bool.

    For multilabel these are the labels that reach their thresholds, 0.5 without thresholds; else the most probable label.
    """
    count = probabilities.shape[1]
    if task == "multilabel":
        return probabilities >= np.asarray(thresholds if len(thresholds) else [0.5] * count, dtype=probabilities.dtype)
    return np.arange(count) == probabilities.argmax(axis=1)[:, None]


def confidences(probabilities: np.ndarray, task: str, thresholds: Sequence[float] = ()) -> np.ndarray:
    """Compute the confidence of each prediction, (N,), from probabilities (N, C).

    It is the probability of the predicted label; for multilabel the mean over the labels of the probability that the decision is right.
    """
    if task == "multilabel":
        positive = predicted_labels(probabilities, task, thresholds)
        return np.where(positive, probabilities, 1 - probabilities).mean(axis=1, dtype=np.float64)
    return probabilities.max(axis=1, initial=0)


def format_prediction(path: str | Path, result: dict[str, Any]) -> str:
    """Format a prediction as one line of text. For multi-label the labels that reach their thresholds come first.

    A prediction that backs off starts with the ancestor.
    """
    labels = ", ".join(f"{row['label']} {row['confidence']:.1%}" for row in result["top"])
    if parent := result.get("backed_off"):
        labels = f"{parent['label']} {parent['confidence']:.1%}  ({labels})"
    if "labels" in result:
        labels = f"{', '.join(result['labels']) or 'no label'}  ({labels})"
    reasons = " and ".join(_SHOWN[code] for code in result.get("abstain_reasons", [LOW_CONFIDENCE]))
    abstained = f"  ({reasons}: ask a person)" if result.get("abstain") else ""
    return f"{path}: {labels}{abstained}" + ("  (the text was truncated)" if result.get("text_truncated") else "")
