"""Convert samples of any bit depth to 8 bits by the file's declared range, never by the values of the image.

The rule is the same in training, scoring and serving: the declared range maps linearly to 0…255, rounded to the nearest level.
Unsigned samples have the range 0…2^bits − 1, unless SMinSampleValue and SMaxSampleValue declare another (TIFF 6.0, tags 340 and 341).
Signed and floating-point samples have no default range: without these tags the file is refused.
"""

from functools import lru_cache

import numpy as np


def to_eight_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low…high to 0…255 and return uint8 of the same shape. Clips values outside; NaN becomes 0. ValueError if high ≤ low."""
    if not high > low:
        raise ValueError(f"sample range {low}…{high} is empty")
    if values.dtype in (np.uint8, np.uint16):
        return _table(float(low), float(high))[values]
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.clip(np.nan_to_num(np.rint(scaled), nan=0.0, posinf=255.0, neginf=0.0), 0, 255).astype(np.uint8)


@lru_cache(maxsize=4)
def _table(low: float, high: float) -> np.ndarray:
    return to_eight_bits(np.arange(65536, dtype=np.float64), low, high)
