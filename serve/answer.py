"""Probabilities to the JSON of an answer. Knows nothing of requests or engines."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np


def prediction(
    row: np.ndarray,
    labels: Sequence[str],
    *,
    top: int,
    thresholds: Sequence[float] | None,
    abstain_below: float | None = None,
    explanation: bytes | None = None,
) -> dict[str, Any]:
    """One picture's answer: its `top` labels, likeliest first.

    row: C probabilities; thresholds: one a label: the answer gains `labels`, those that reach theirs; abstain_below: the answer gains
    `abstain`, whether its confidence lies below it: such an answer should be left to a person. At 1 every answer does; explanation: a PNG,
    in base64 in the answer.
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
        answer["explanation"] = base64.b64encode(explanation).decode()
    return answer
