"""Find near-duplicates: images of `val` and `test` that resemble a training image though their files differ.

Examples are an image that was saved again, resized or slightly brightened.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import cv2
import numpy as np

from refract.augment import Preprocess
from refract.cores import mapped
from refract.pipeline.data.manifest import Manifest, Sample
from refract.progress import tracked

BITS = 7
"""Bits of 128 in which two difference hashes may differ. At least one of the 8 parts of 16 bits is then equal, which finds the pairs."""
PARTS = 8
PAIRS = 1 << 20
"""Pairs of hashes that are compared at once, about, which bounds the memory."""
SMALLEST, PLAIN = 16, 0.3
"""An image has no difference hash if its shorter side is below SMALLEST pixels, or its fraction of equal neighbouring cells reaches PLAIN.
Such an image is flat, or shows strokes or one object on an empty ground, and would resemble too many others. The fraction is 0.07 for
photographs and 0.44 for digits."""
SIDE, ALIKE = 32, 0.97
"""Candidates are compared as grey images of SIDE×SIDE pixels; a correlation of at least ALIKE makes them near-duplicates."""
NEAREST = 64
"""Candidates per image, those of the nearest hashes. This bounds the work for data in which all images look alike."""


def difference_hash(pixels: np.ndarray) -> bytes:
    """Return a hash of 16 bytes that changes little under small changes of the image; empty for an image with too little structure.

    Its bits say whether each of 8×8 cells is brighter than its right and its lower neighbour. pixels: uint8 H×W×3. Source: the difference
    hash of N. Krawetz (2013), in both directions.
    """
    if min(pixels.shape[:2]) < SMALLEST:
        return b""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (9, 9), interpolation=cv2.INTER_AREA).astype(np.int16)
    steps = np.stack([small[:8, :8] - small[:8, 1:], small[:8, :8] - small[1:, :8]])
    return np.packbits(steps > 0).tobytes() if (np.abs(steps) <= 1).mean() < PLAIN else b""


def near_pairs(manifest: Manifest, hashes: Mapping[str, bytes]) -> tuple[tuple[str, str], ...]:
    """Return (path of a `val` or `test` image, path of the training image that it resembles most), one pair per such image.

    hashes: path → `difference_hash`. OSError if an image is no longer readable.
    """
    train = [sample for sample in manifest.of("train") if hashes.get(sample.path)]
    measured = [sample for sample in manifest.samples if sample.split in ("val", "test") and hashes.get(sample.path)]
    pairs = _candidates([hashes[s.path] for s in measured], [hashes[s.path] for s in train])
    duplicates = {}
    for i, others, correlations in _correlated(pairs, measured, train):
        if correlations.max() >= ALIKE:
            duplicates[measured[i].path] = train[others[int(correlations.argmax())]].path
    return tuple(duplicates.items())


def near_duplicates_among(samples: Sequence[Sample], hashes: Mapping[str, bytes]) -> list[tuple[int, int]]:
    """Return (index, index) of samples that are near-duplicates of each other. Other arguments and OSError as `near_pairs`."""
    hashed = [index for index, sample in enumerate(samples) if hashes.get(sample.path)]
    images = [samples[index] for index in hashed]
    keys = [hashes[sample.path] for sample in images]
    candidates = ((i, [j for j in others if j != i]) for i, others in _candidates(keys, keys))
    pairs = [(i, others) for i, others in candidates if others]
    return [
        (hashed[i], hashed[j])
        for i, others, correlations in _correlated(pairs, images, images)
        for j, correlation in zip(others, correlations, strict=True)
        if correlation >= ALIKE
    ]


def _correlated(
    pairs: Sequence[tuple[int, list[int]]], measured: Sequence[Sample], train: Sequence[Sample]
) -> Iterator[tuple[int, list[int], np.ndarray]]:
    """Yield each pair of `_candidates` with the correlations of the images, in the order of the second indices."""
    wanted = {s.path: s for i, others in pairs for s in (measured[i], *(train[j] for j in others))}
    results = tracked(mapped(_standardised, list(wanted.values())), "comparing near-duplicates", len(wanted))
    thumbnails = dict(zip(wanted, results, strict=True))
    for i, others in pairs:
        yield i, others, np.stack([thumbnails[train[j].path] for j in others]) @ thumbnails[measured[i].path] / SIDE**2


def _candidates(measured: Sequence[bytes], train: Sequence[bytes]) -> list[tuple[int, list[int]]]:
    """Return (index in `measured`, indices in `train`) of hashes that differ in at most BITS bits: up to NEAREST, the nearest first."""
    indices_of: dict[bytes, list[int]] = defaultdict(list)
    for j, image_hash in enumerate(train):
        indices_of[image_hash].append(j)
    if not measured or not indices_of:
        return []
    members = list(indices_of.values())
    candidates = []
    for i, rows in _near_rows(b"".join(measured), b"".join(indices_of)):
        candidates.append((i, [j for row in rows for j in members[row]][:NEAREST]))
    return candidates


def _near_rows(measured: bytes, train: bytes) -> Iterator[tuple[int, list[int]]]:
    """Yield (row, rows of `train` whose hashes differ in at most BITS bits: up to NEAREST, the nearest first). Each hash has 16 bytes."""
    ours, theirs = (np.frombuffer(hashes, np.uint16).reshape(-1, PARTS) for hashes in (measured, train))
    words, their_words = (np.frombuffer(hashes, np.uint64).reshape(-1, 2) for hashes in (measured, train))
    orders = [np.argsort(column, kind="stable") for column in theirs.T]
    columns = [column[order] for column, order in zip(theirs.T, orders, strict=True)]
    starts, ends = (
        np.stack([np.searchsorted(column, ours[:, part], side) for part, column in enumerate(columns)])
        for side in ("left", "right")
    )
    counts = ends - starts
    for block in np.split(np.arange(len(ours)), np.flatnonzero(np.diff(counts.sum(axis=0).cumsum() // PAIRS)) + 1):
        pairs = []
        for part, order in enumerate(orders):
            count = counts[part, block]
            left = np.repeat(block, count)
            offsets = np.arange(len(left)) - np.repeat(count.cumsum() - count, count)
            right = order[np.repeat(starts[part, block], count) + offsets]
            bits = np.zeros(len(left), np.uint8)
            for word, their_word in zip(words.T, their_words.T, strict=True):  # the first one excludes most pairs
                bits += np.bitwise_count(word[left] ^ their_word[right])
                near = bits <= BITS
                left, right, bits = left[near], right[near], bits[near]
            pairs.append(np.stack([left, bits, right], axis=1))
        yield from _nearest(np.unique(np.concatenate(pairs), axis=0))


def _nearest(pairs: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """Yield (row, other rows) of pairs (N, 3) of row, differing bits and other row, which are sorted and distinct."""
    rows, firsts, counts = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    for row, first, count in zip(rows.tolist(), firsts.tolist(), counts.tolist(), strict=True):
        yield row, pairs[first : first + min(count, NEAREST), 2].tolist()


def _standardised(sample: Sample) -> np.ndarray:
    """Return the sample's grey thumbnail, float32 (SIDE²,), standardised: the mean product of two is their correlation."""
    grey = cv2.cvtColor(_shrink(sample.read()), cv2.COLOR_RGB2GRAY).ravel().astype(np.float32)
    return (grey - grey.mean()) / max(float(grey.std()), 1e-6)


_shrink = Preprocess(SIDE, SIDE, resize="squash")
