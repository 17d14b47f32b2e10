"""Run passes on encoded bytes: decode only the part that the first pass reads."""

from collections.abc import Sequence

import numpy as np

from refract.augment.decoding.decode import decode_part
from refract.augment.executors import cpu
from refract.augment.passes import Pass, WarpPass
from refract.augment.resize_libraries import LIBRARIES

LARGEST_SCALE = 8


def run(
    passes: Sequence[Pass],
    data: bytes,
    size: tuple[int, int],
    *,
    cropped: bool = True,
    max_pixels: int | None = None,
    color_profile: str = "ignore",
) -> np.ndarray:
    """Return the result of `cpu.run` on the decoded image, within a few grey levels if the JPEG decoder does part of the reduction.

    size: `image_size(data)`. cropped: whether to decode only the part that is read.
    max_pixels, color_profile, ImageError, TooManyPixelsError: see `decode`.
    """
    remaining, pixels = decode_for(
        passes, data, size, cropped=cropped, max_pixels=max_pixels, color_profile=color_profile
    )
    return cpu.run(remaining, pixels)


def decode_for(
    passes: Sequence[Pass],
    data: bytes,
    size: tuple[int, int],
    *,
    cropped: bool = True,
    max_pixels: int | None = None,
    color_profile: str = "ignore",
) -> tuple[list[Pass], np.ndarray]:
    """Decode and return (the passes, adapted to the decoded part; the decoded pixels). Arguments: see `run`."""
    first = passes[0] if passes else None
    if not isinstance(first, WarpPass):
        whole = decode_part(data, None, size=size, max_pixels=max_pixels, color_profile=color_profile)
        return list(passes), whole.pixels
    box = first.footprint(size) if cropped else None
    scale = 1 if first.interpolation in LIBRARIES else min(*first.shrink(), LARGEST_SCALE)
    part = decode_part(data, box, size=size, scale=scale, max_pixels=max_pixels, color_profile=color_profile)
    return [first.on_part(part.scale, part.top, part.left), *passes[1:]], part.pixels
