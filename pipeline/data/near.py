"""Pictures that look alike though their files differ: saved again, of another size, a little brighter. Finds those of the hold-out that
resemble one that was trained on."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from augment import decode
from pipeline.data.manifest import Manifest, Sample

BITS = 7
"""Of the 128 of a look, in which two may differ: then one of its 8 parts is equal, by which pairs are found."""
SMALLEST, FLAT, PLAIN = 16, 3.0, 40
"""Pixels a side, grey levels of deviation, and bits that are set (photographs have about 64), below which a picture has no look: it is
flat, or strokes on an empty ground, as digits are, and would be like too many others."""
SIDE, ALIKE = 32, 0.97
"""Candidates are compared as grey pictures of SIDE pixels: the correlation from which on they are told."""
CANDIDATES = 20_000


def look_of(pixels: np.ndarray) -> bytes:
    """16 bytes that small changes hardly change: whether each of 8×8 places is brighter than its right and than its lower neighbour; empty
    for one of too little structure. pixels: uint8 H×W×3. Source: the difference hash of N. Krawetz (2013), in both directions."""
    if min(pixels.shape[:2]) < SMALLEST:
        return b""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (9, 9), interpolation=cv2.INTER_AREA).astype(np.int16)
    if small.std() < FLAT:
        return b""
    right, below = small[:8, :8] > small[:8, 1:], small[:8, :8] > small[1:, :8]
    bits = np.stack([right, below])
    return np.packbits(bits).tobytes() if bits.sum() >= PLAIN else b""


def near_pairs(manifest: Manifest, looks: Mapping[str, bytes]) -> tuple[tuple[str, str], ...]:
    """(path of a picture of `val` or `test`, path of one of `train` that it resembles), one for each such picture of the hold-out.

    looks: path → `look_of` of it. OSError where a picture cannot be read any more.
    """
    trained = [sample for sample in manifest.of("train") if looks.get(sample.path)]
    held = [sample for sample in manifest.samples if sample.split in ("val", "test") and looks.get(sample.path)]
    pairs = _candidates([looks[s.path] for s in held], [looks[s.path] for s in trained])
    found: dict[str, tuple[float, str]] = {}
    with ThreadPoolExecutor() as pool:
        alike = pool.map(lambda pair: _alike(held[pair[0]], trained[pair[1]]), pairs)
        for (i, j), value in zip(pairs, alike, strict=True):
            if value >= ALIKE and value > found.get(held[i].path, (0.0, ""))[0]:
                found[held[i].path] = (value, trained[j].path)
    return tuple((path, other) for path, (_, other) in found.items())


def _candidates(held: Sequence[bytes], trained: Sequence[bytes]) -> list[tuple[int, int]]:
    """Places of looks that differ in at most BITS bits, at most CANDIDATES, the nearest first."""
    if not held or not trained:
        return []
    ours, theirs = (np.frombuffer(b"".join(looks), np.uint16).reshape(-1, 8) for looks in (held, trained))
    pairs: dict[tuple[int, int], int] = {}
    for part in range(8):
        places = defaultdict(list)
        for j, value in enumerate(theirs[:, part].tolist()):
            places[value].append(j)
        rows = {value: np.array(own) for value, own in places.items()}
        for i, value in enumerate(ours[:, part].tolist()):
            if value in rows:
                differing = np.bitwise_count(ours[i] ^ theirs[rows[value]]).sum(axis=1)
                near = differing <= BITS
                pairs.update(zip(((i, j) for j in rows[value][near].tolist()), differing[near].tolist(), strict=True))
    return sorted(pairs, key=pairs.__getitem__)[:CANDIDATES]


def _alike(one: Sample, other: Sample) -> float:
    """The correlation of the two as small grey pictures."""
    small = [
        cv2.resize(cv2.cvtColor(decode(sample.read()), cv2.COLOR_RGB2GRAY), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        for sample in (one, other)
    ]
    return float(np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1])
