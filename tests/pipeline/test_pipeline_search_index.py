"""The search in memory returns what a comparison with all vectors returns."""

from pathlib import Path

import numpy as np
import pytest

from refract.pipeline.features.index import FEWEST, PROJECTED, CosineIndex
from refract.pipeline.features.search import SearchIndex, nearest
from refract.pipeline.features.store import FeatureStore, Key, StoredSample, write_vectors


def vectors_of(kind: str, count: int = 2 * FEWEST, width: int = 3 * PROJECTED) -> np.ndarray:
    """Draw float16 vectors: `decaying` as a network's embeddings, `random` in all directions, `equal`: many copies and zeros."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, width))
    if kind == "decaying":
        rows = np.maximum(0, rows / np.arange(1, width + 1) ** 0.7) @ rng.normal(size=(width, width)) / width**0.5
    if kind == "equal":
        rows = rows[rng.integers(0, 7, count)] * rng.integers(0, 2, (count, 1))
    return rows.astype(np.float16)


@pytest.mark.parametrize("kind", ["decaying", "random", "equal"])
@pytest.mark.parametrize("count", [1, 5, 300])
def test_single_queries_find_what_a_comparison_with_all_finds(kind: str, count: int) -> None:
    vectors = vectors_of(kind)
    queries = np.concatenate([vectors[:3], vectors[3:6] + vectors[10:13], np.zeros_like(vectors[:1])])
    units = vectors.astype(np.float64)
    units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-12)
    index = CosineIndex(vectors)
    assert (index._basis is None) == (kind == "random"), "the case tests what it names"
    together = index.nearest(np.repeat(queries, 2, axis=0), count)[1][::2]
    for query, batched in zip(queries, together, strict=True):
        cosines = units @ (query.astype(np.float64) / max(np.linalg.norm(query.astype(np.float64)), 1e-12))
        expected = np.sort(cosines)[::-1][:count]
        ((indices, values),) = (tuple(part[0] for part in index.nearest(query[None], count)),)
        np.testing.assert_allclose(values, expected, atol=1e-5)
        np.testing.assert_allclose(cosines[indices], expected, atol=1e-5)
        np.testing.assert_allclose(batched, expected, atol=1e-5)
        assert len({*indices.tolist()}) == count


def test_fewer_vectors_than_asked_for_are_all_returned() -> None:
    indices, cosines = CosineIndex(np.eye(3, dtype=np.float16)).nearest(np.array([[0.0, 2.0, 1.0]]), 5)
    assert indices.tolist() == [[1, 2, 0]] and cosines[0] == pytest.approx([0.8944, 0.4472, 0], abs=1e-3)


def test_the_index_of_a_store_finds_what_the_search_through_its_shards_finds(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "0" * 64, {})
    vectors = vectors_of("decaying", 1500).astype(np.float32)
    samples = [StoredSample(f"{row:064x}", f"{row:04}.jpg", ("a",)) for row in range(len(vectors))]
    for start in range(0, len(samples), 512):
        rows = slice(start, start + 512)
        write_vectors(store.folder, [Key(s.content) for s in samples[rows]], samples[rows], vectors[rows])
    with pytest.raises(ValueError, match="holds no sample"):
        SearchIndex(store)
    store.add_samples("data", samples)
    index = SearchIndex(store)
    for query in vectors[:3, None] + np.float32(0.01):
        (neighbours,), (expected,) = index.nearest(query, 5), nearest(store, query, 5)
        assert [n.sample for n in neighbours] == [n.sample for n in expected]
        assert [n.similarity for n in neighbours] == pytest.approx([n.similarity for n in expected], abs=1e-5)
