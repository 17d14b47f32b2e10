"""Fold long feature vectors to a fixed length, so that distances stay what they were in expectation."""

import numpy as np

WIDEST = 512
"""The largest number of features; more are folded."""


def folding(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (sums int64, signs float32), one for each of `width` features: each is added, with its sign, to one of WIDEST sums.

    Both follow from the feature's number alone. Source: Charikar et al. 2002, "Finding frequent items in data streams" (count sketch);
    Weinberger et al. 2009, arXiv:0902.2206. Deviation: the hash is the mixer of Steele et al. 2014 (SplitMix), the same everywhere.
    """
    number = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    number ^= number >> np.uint64(31)
    signs = np.where(number & np.uint64(1), 1.0, -1.0).astype(np.float32)
    return ((number >> np.uint64(1)) % np.uint64(WIDEST)).astype(np.int64), signs
