"""Find the stored samples that are most similar to an image, by the cosine similarity of their embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refract.pipeline.features.store import FeatureStore, Key, StoredSample


@dataclass(frozen=True)
class Neighbour:
    """A stored sample, and the cosine similarity of its embedding to the image's, -1…1."""

    sample: StoredSample
    similarity: float


def nearest(store: FeatureStore, vectors: np.ndarray, count: int) -> list[list[Neighbour]]:
    """Return for each of the vectors (N, D) the `count` most similar samples of all sources in the store, most similar first.

    The result is exact. Memory holds the list of samples and the embeddings of one shard.
    """
    store.refresh()
    samples = [sample for sample in store.samples() if Key(sample.content) in store]
    rows = store.rows([Key(sample.content) for sample in samples])
    best: list[list[Neighbour]] = [[] for _ in vectors]
    units = normalised(vectors)
    for file, places in rows.items():
        positions, file_rows = np.array(places).T
        similarities = normalised(store.matrix(file)[file_rows]) @ units.T
        for query, column in enumerate(similarities.T):
            order = np.argsort(-column, kind="stable")[:count]
            found = [Neighbour(samples[positions[i]], float(column[i])) for i in order]
            best[query] = _first(best[query] + found, count)
    return best


def _first(neighbours: Sequence[Neighbour], count: int) -> list[Neighbour]:
    return sorted(neighbours, key=lambda n: (-n.similarity, n.sample.path))[:count]


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Divide each row by its norm. (N, D) → float32 (N, D); a zero vector stays zero."""
    wide = vectors.astype(np.float32)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12))
