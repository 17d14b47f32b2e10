"""Images that a server captured, because it was uncertain: the most uncertain and the least familiar ones first."""

import numpy as np

from refract.pipeline.review.data import ReviewData, listed, percent
from refract.pipeline.review.items import Entry

SURPRISING = 0.95
"""Fraction of the data set's images that are more familiar than an image that counts as unfamiliar."""


def served(data: ReviewData) -> tuple[Entry, ...] | None:
    """Rank the captured items: contradicted by feedback, then by the larger of uncertainty and unfamiliarity. None without any."""
    if not data.captured:
        return None
    entries = []
    for item, captured in data.captured.items():
        familiarity = data.items[item].familiarity
        unfamiliar = 0.0 if familiarity is None else 1 - familiarity
        score = max(1 - captured.confidence, unfamiliar)
        reason = (
            f"The server predicted {listed(captured.predicted)} with a confidence of {percent(captured.confidence)}."
        )
        if unfamiliar >= SURPRISING:
            reason += f" {percent(unfamiliar)} of the data set's images are more familiar."
        if captured.feedback is not None:
            score += set(captured.feedback) != set(captured.predicted)
            reason += f" The client's feedback is {listed(captured.feedback)}."
        entries.append(Entry(item, round(score, 4), reason))
    return tuple(sorted(entries, key=lambda entry: -entry.score))


def familiarities(distances: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the fraction of `reference` distances that exceed each distance, float (N,) in 0…1. reference: (M,), M > 0."""
    ranks = np.searchsorted(np.sort(reference), distances, side="right")
    return np.asarray(1 - ranks / len(reference))
