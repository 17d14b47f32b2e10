"""Images that look alike though their files differ: saved again, of another size, a little brighter. Finds those of the hold-out that
resemble one that was trained on."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from refract.augment import Preprocess
from refract.pipeline.data.manifest import Manifest, Sample

BITS = 7
"""Of the 128 of a look, in which two may differ: then one of its 8 parts is equal, by which pairs are found."""
SMALLEST, PLAIN = 16, 0.3
"""Pixels a side below which, and share of neighbouring places of one grey from which on, an image has no look: it is flat, or strokes or
one thing on an empty ground, as digits are, and would be like too many others. (Photographs have 0.07 of such places, digits 0.44.)"""
SIDE, ALIKE = 32, 0.97
"""Candidates are compared as grey images of SIDE pixels: the correlation from which on they are told."""
NEAREST = 64
"""Candidates that an image is compared with, those of the nearest looks: where all images look alike, not all pairs are compared."""


def look_of(pixels: np.ndarray) -> bytes:
    """16 bytes that small changes hardly change: whether each of 8×8 places is brighter than its right and than its lower neighbour; empty
    for one of too little structure. pixels: uint8 H×W×3. Source: the difference hash of N. Krawetz (2013), in both directions."""
    if min(pixels.shape[:2]) < SMALLEST:
        return b""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (9, 9), interpolation=cv2.INTER_AREA).astype(np.int16)
    steps = np.stack([small[:8, :8] - small[:8, 1:], small[:8, :8] - small[1:, :8]])
    return np.packbits(steps > 0).tobytes() if (np.abs(steps) <= 1).mean() < PLAIN else b""


def near_pairs(manifest: Manifest, looks: Mapping[str, bytes]) -> tuple[tuple[str, str], ...]:
    """(path of an image of `val` or `test`, path of one of `train` that it resembles), one for each such image of the hold-out.

    looks: path → `look_of` of it. OSError where an image cannot be read any more.
    """
    trained = [sample for sample in manifest.of("train") if looks.get(sample.path)]
    held = [sample for sample in manifest.samples if sample.split in ("val", "test") and looks.get(sample.path)]
    pairs = _candidates([looks[s.path] for s in held], [looks[s.path] for s in trained])
    wanted = {s.path: s for i, others in pairs for s in (held[i], *(trained[j] for j in others))}
    with ThreadPoolExecutor() as pool:
        small = dict(zip(wanted, pool.map(_small, wanted.values()), strict=True))
    found = {}
    for i, others in pairs:
        values = np.stack([small[trained[j].path] for j in others]) @ small[held[i].path] / SIDE**2
        if values.max() >= ALIKE:
            found[held[i].path] = trained[others[int(values.argmax())]].path
    return tuple(found.items())


def _candidates(held: Sequence[bytes], trained: Sequence[bytes]) -> list[tuple[int, list[int]]]:
    """For each of the held that has any, places of looks that differ from its own in at most BITS bits: the NEAREST, the nearest first."""
    places_of: dict[bytes, list[int]] = defaultdict(list)
    for j, look in enumerate(trained):
        places_of[look].append(j)
    if not held or not places_of:
        return []
    ours, theirs = (np.frombuffer(b"".join(looks), np.uint16).reshape(-1, 8) for looks in (held, places_of))
    members = list(places_of.values())
    nearest: list[dict[int, int]] = [{} for _ in held]
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
    found = [
        (i, [j for row in sorted(near, key=near.__getitem__) for j in members[row]][:NEAREST])
        for i, near in enumerate(nearest)
    ]
    return [(i, others) for i, others in found if others]


def _small(sample: Sample) -> np.ndarray:
    """Standardised, so that a product of two is their correlation."""
    grey = cv2.cvtColor(_shrink(sample.read()), cv2.COLOR_RGB2GRAY).ravel().astype(np.float32)
    return (grey - grey.mean()) / max(float(grey.std()), 1e-6)


_shrink = Preprocess(SIDE, SIDE, resize="squash")
