"""The images of a review and what is known about them: embeddings, predictions, and what a server captured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from refract.models.hierarchy import Hierarchy
from refract.pipeline.data.manifest import Sample
from refract.pipeline.review.items import Item, Prediction

BLOCK = 2048
"""Images whose similarities to all labelled images are computed at once, which bounds the memory."""


@dataclass(frozen=True)
class Predictions:
    """A model's probabilities for some items. labels: names of the C columns; items: N indices, rising; rows: float32 (N, C)."""

    labels: tuple[str, ...]
    items: tuple[int, ...]
    rows: np.ndarray

    def best(self) -> list[str]:
        """Return the most probable label of each row."""
        return [self.labels[column] for column in self.rows.argmax(axis=1).tolist()]

    def most_probable(self, row: int, count: int) -> tuple[Prediction, ...]:
        """Return the `count` most probable labels of a row."""
        values = self.rows[row]
        order = np.argsort(-values, kind="stable")[:count].tolist()
        return tuple(Prediction(self.labels[column], round(float(values[column]), 4)) for column in order)


@dataclass(frozen=True)
class Captured:
    """What a server recorded about an image. confidence: 0…1; predicted, feedback: labels, feedback None without one."""

    confidence: float
    predicted: tuple[str, ...]
    feedback: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ReviewData:
    """The images of a review, each content once: first those of the data set, then the new ones.

    - labels: C names, sorted
    - labelled: number M of items in the data set, M > 0
    - vectors: float32 (N, at most 512), of length 1
    - targets: bool (M, C)
    - out_of_fold: float32 (M, C), probabilities by models that were not trained on the item, NaN rows where unknown
    - predicted: the predictions for the new items
    - contradictory: item → a sentence on its copies, which have different labels
    - alike: (item, item) of near-duplicates by their hashes, both in the data set
    - captured: of items that a server captured
    - champion: the bundle's predictions for items that it was not trained on; challenger: another bundle's predictions for the same items;
      None without these bundles
    - hierarchy: the hierarchy of the classes, None without one
    """

    items: tuple[Item, ...]
    labels: tuple[str, ...]
    labelled: int
    vectors: np.ndarray
    targets: np.ndarray
    out_of_fold: np.ndarray
    predicted: Predictions
    multilabel: bool = False
    contradictory: Mapping[int, str] = field(default_factory=dict)
    alike: Sequence[tuple[int, int]] = ()
    captured: Mapping[int, Captured] = field(default_factory=dict)
    champion: Predictions | None = None
    challenger: Predictions | None = None
    hierarchy: Hierarchy | None = None

    @property
    def names(self) -> list[tuple[str, ...]]:
        """The labels of the items of the data set."""
        return [item.labels for item in self.items[: self.labelled]]

    def unlabelled(self) -> list[int]:
        """Return the new items that no server captured."""
        return [item.index for item in self.items[self.labelled :] if item.index not in self.captured]

    def ancestors(self, label: str) -> tuple[str, ...]:
        """Return the parent of a label, its parent and so on, up to the root; nothing without a hierarchy or for a new class."""
        if self.hierarchy is None or label not in self.hierarchy.parents:
            return ()
        return self.hierarchy.path(label)[-2::-1]

    def sample(self, item: int) -> Sample:
        return self.items[item].sample

    def nearest(self, item: int, count: int) -> list[tuple[int, float]]:
        """Return (index, cosine similarity) of the most similar items of the data set, most similar first."""
        similarities = self.vectors[: self.labelled] @ self.vectors[item]
        if item < self.labelled:
            similarities[item] = -np.inf
        count = min(count, self.labelled - (item < self.labelled))
        if count < 1:
            return []
        best = np.argpartition(-similarities, count - 1)[:count]
        order = best[np.lexsort((best, -similarities[best]))]
        return [(int(other), round(float(similarities[other]), 4)) for other in order]

    def distances(self, items: Sequence[int]) -> np.ndarray:
        """Return 1 − the cosine similarity of each item to the nearest other item of the data set, float32 (N,) in 0…2."""
        return np.concatenate([np.zeros(0, np.float32), *self._distances(np.asarray(items, np.int64))])

    def _distances(self, items: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(items), BLOCK):
            block = items[start : start + BLOCK]
            similarities = self.vectors[block] @ self.vectors[: self.labelled].T
            rows = np.flatnonzero(block < self.labelled)
            similarities[rows, block[rows]] = -1.0
            yield 1 - similarities.max(axis=1)


def percent(probability: float) -> str:
    """Return a probability as a text: `93 %`, `< 1 %`."""
    return "< 1 %" if 0 < probability < 0.01 else f"{100 * probability:.0f} %"


def listed(labels: Sequence[str]) -> str:
    """Return labels as a text, `no label` without one."""
    return ", ".join(labels) or "no label"
