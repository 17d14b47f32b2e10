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
    ours, theirs = (np.frombuffer(b"".join(hashes), np.uint16).reshape(-1, 8) for hashes in (measured, indices_of))
    members = list(indices_of.values())
    nearest: list[dict[int, int]] = [{} for _ in measured]
    for part in range(8):
        rows_of = defaultdict(list)
        for row, value in enumerate(theirs[:, part].tolist()):
            rows_of[value].append(row)
        buckets = {value: np.array(rows) for value, rows in rows_of.items()}
        for i, value in enumerate(ours[:, part].tolist()):
            if value in buckets:
                differing = np.bitwise_count(ours[i] ^ theirs[buckets[value]]).sum(axis=1)
                near = np.flatnonzero(differing <= BITS)
                near = near[np.argsort(differing[near], kind="stable")[:NEAREST]]
                nearest[i].update(zip(buckets[value][near].tolist(), differing[near].tolist(), strict=True))
    candidates = [
        (i, [j for row in sorted(near, key=near.__getitem__) for j in members[row]][:NEAREST])
        for i, near in enumerate(nearest)
    ]
    return [(i, others) for i, others in candidates if others]


def _standardised(sample: Sample) -> np.ndarray:
    """Return the sample's grey thumbnail, float32 (SIDE²,), standardised: the mean product of two is their correlation."""
    grey = cv2.cvtColor(_shrink(sample.read()), cv2.COLOR_RGB2GRAY).ravel().astype(np.float32)
    return (grey - grey.mean()) / max(float(grey.std()), 1e-6)


_shrink = Preprocess(SIDE, SIDE, resize="squash")
