"""Passes on encoded bytes: decode what the first of them reads, no more."""

from collections.abc import Sequence

import numpy as np

from refract.augment.decoding.decode import decode_part
from refract.augment.executors import cpu
from refract.augment.fuse import Pass, WarpPass

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
    """What `cpu.run` gives on the decoded image; within a few grey levels where the JPEG decoder does a part of the reduction.

    size: `image_size(data)`. cropped: whether to decode only the part that is read. color_profile: see `decode`, as the ImageError
    and TooManyPixelsError.
    """
    left, pixels = decode_for(passes, data, size, cropped=cropped, max_pixels=max_pixels, color_profile=color_profile)
    return cpu.run(left, pixels)


def decode_for(
    passes: Sequence[Pass],
    data: bytes,
    size: tuple[int, int],
    *,
    cropped: bool = True,
    max_pixels: int | None = None,
    color_profile: str = "ignore",
) -> tuple[list[Pass], np.ndarray]:
    """(the passes as they are on what was decoded, the decoded pixels). Arguments as for `run`."""
    first = passes[0] if passes else None
    if not isinstance(first, WarpPass):
        whole = decode_part(data, None, size=size, max_pixels=max_pixels, color_profile=color_profile)
        return list(passes), whole.pixels
    box = first.footprint(size) if cropped else None
    scale = min(*first.shrink(), LARGEST_SCALE)
    part = decode_part(data, box, size=size, scale=scale, max_pixels=max_pixels, color_profile=color_profile)
    return [first.on_part(part.scale, part.top, part.left), *passes[1:]], part.pixels
