"""Copies and near-duplicates with different labels: at least one of the labels is wrong."""

from collections.abc import Iterator, Sequence

import numpy as np

from refract.pipeline.data.manifest import Sample
from refract.pipeline.features.near_duplicates import ALIKE, correlation, thumbnail
from refract.pipeline.review.data import BLOCK, ReviewData, listed
from refract.pipeline.review.items import Entry

LEAST_COSINE, MOST = 0.8, 500
"""Least similarity of images that are compared by their details, and the largest number of such pairs, the most similar first."""


def near_duplicates(data: ReviewData) -> tuple[Entry, ...]:
    """Return one entry for each pair of near-duplicates with different labels, and for each image with contradictory copies."""
    entries = {item: Entry(item, 2.0, reason) for item, reason in data.contradictory.items()}
    paired: set[int] = set()
    for first, second, score in _pairs(data):
        if first in entries or {first, second} <= paired:
            continue
        paired |= {first, second}
        names = data.items[first].labels, data.items[second].labels
        reason = f"This image, {listed(names[0])}, is a near-duplicate of another one, {listed(names[1])}."
        entries[first] = Entry(first, round(score, 4), reason, second)
    return tuple(sorted(entries.values(), key=lambda entry: -entry.score))


def _pairs(data: ReviewData) -> Iterator[tuple[int, int, float]]:
    """Yield (item, item, correlation or 1) of near-duplicates with different labels."""
    known = set()
    for first, second in data.alike:
        pair = min(first, second), max(first, second)
        if data.items[first].labels != data.items[second].labels and pair not in known:
            known.add(pair)
            yield *pair, 1.0
    thumbnails: dict[int, np.ndarray | None] = {}
    for first, second in _similar(data.vectors[: data.labelled], data.names):
        if (first, second) in known:
            continue
        for item in (first, second):
            if item not in thumbnails:
                thumbnails[item] = _thumbnail(data.sample(item))
        left, right = thumbnails[first], thumbnails[second]
        if left is not None and right is not None and (alike := correlation(left, right)) >= ALIKE:
            yield first, second, alike


def _similar(vectors: np.ndarray, names: Sequence[tuple[str, ...]]) -> list[tuple[int, int]]:
    """Return the MOST most similar pairs with different labels, (N, D) vectors of length 1: of each item its nearest such item."""
    codes = np.unique([";".join(sorted(row)) for row in names], return_inverse=True)[1]
    cosines: dict[tuple[int, int], float] = {}
    for start in range(0, len(vectors), BLOCK):
        similarities = vectors[start : start + BLOCK] @ vectors.T
        similarities[codes[start : start + BLOCK, None] == codes[None]] = -1
        for row, other in enumerate(similarities.argmax(axis=1).tolist()):
            if (value := float(similarities[row, other])) >= LEAST_COSINE:
                cosines[min(start + row, other), max(start + row, other)] = value
    return sorted(cosines, key=lambda pair: (-cosines[pair], pair))[:MOST]


def _thumbnail(sample: Sample) -> np.ndarray | None:
    try:
        return thumbnail(sample)
    except OSError:  # removed since it was embedded
        return None
