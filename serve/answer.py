"""Probabilities to the JSON of an answer. Knows nothing of requests or engines."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def prediction(
    row: np.ndarray, labels: Sequence[str], *, top: int, thresholds: Sequence[float] | None
) -> dict[str, Any]:
    """One picture's answer: its `top` labels, likeliest first.

    row: C probabilities; thresholds: of a multilabel model, one a label: the answer gains `labels`, those that
    reach theirs.
    """
    # Stable, so that equal probabilities come in the order of the labels, on every machine.
    order = np.argsort(-row, kind="stable")[:top]
    best = [{"label": labels[i], "confidence": float(row[i])} for i in order.tolist()]
    answer = {**best[0], "top": best}
    if thresholds is not None:
        reached = np.flatnonzero(row >= np.asarray(thresholds, dtype=row.dtype))
        answer["labels"] = [labels[i] for i in reached.tolist()]
    return answer
