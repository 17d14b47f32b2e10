"""Find the stored samples that are most similar to an image, by the cosine similarity of their embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refract.pipeline.features.index import CosineIndex, lengths, normalised, widened
from refract.pipeline.features.store import FeatureStore, Key, StoredSample


@dataclass(frozen=True)
class Neighbour:
    """A stored sample, and the cosine similarity of its embedding to the image's, -1…1."""

    sample: StoredSample
    similarity: float


class SearchIndex:
    """The embeddings of a store in memory, for many searches. Later changes of the store are not seen.

    10,000 embeddings of 1,280 features take 62 MB and half a second to read.
    """

    def __init__(self, store: FeatureStore) -> None:
        """ValueError for a store without samples."""
        store.refresh()
        self.samples = [sample for sample in store.samples() if Key(sample.content) in store]
        if not self.samples:
            raise ValueError(f"{store.folder}: holds no sample; run `refract embed` first")
        self._index = CosineIndex(store.vectors([Key(sample.content) for sample in self.samples]))

    def nearest(self, vectors: np.ndarray, count: int) -> list[list[Neighbour]]:
        """Return for each of the vectors (N, D) the `count` most similar samples, most similar first. The result is exact."""
        return [
            [Neighbour(self.samples[index], float(cosine)) for index, cosine in zip(*row, strict=True)]
            for row in zip(*self._index.nearest(vectors, count), strict=True)
        ]


def nearest(store: FeatureStore, vectors: np.ndarray, count: int) -> list[list[Neighbour]]:
    """Return for each of the vectors (N, D) the `count` most similar samples of all sources in the store, most similar first.

    The result is exact. Memory holds the list of samples and the embeddings of one shard. For many calls use `SearchIndex`.
    """
    store.refresh()
    samples = [sample for sample in store.samples() if Key(sample.content) in store]
    rows = store.rows([Key(sample.content) for sample in samples])
    best: list[list[Neighbour]] = [[] for _ in vectors]
    units = normalised(vectors)
    for file, places in rows.items():
        positions, file_rows = np.array(places).T
        similarities = _cosines(store.matrix(file), units)[file_rows]
        for query, column in enumerate(similarities.T):
            order = np.argsort(-column, kind="stable")[:count]
            neighbours = [Neighbour(samples[positions[i]], float(column[i])) for i in order]
            best[query] = _first(best[query] + neighbours, count)
    return best


def _cosines(stored: np.ndarray, units: np.ndarray) -> np.ndarray:
    """(N, D) stored embeddings, (Q, D) unit vectors → (N, Q) cosines. The products are divided, which are fewer than the embeddings."""
    wide = widened(stored)
    return np.asarray((wide @ units.T) / lengths(wide)[:, None])


def _first(neighbours: Sequence[Neighbour], count: int) -> list[Neighbour]:
    return sorted(neighbours, key=lambda n: (-n.similarity, n.sample.path))[:count]
