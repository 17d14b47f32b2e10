"""Embedded colour profiles (ICC.1): pixels to sRGB by LittleCMS, and the profiles that need no conversion.

A transform is built once for each profile and applied to 8-bit pixels, after a JPEG was reduced and cropped. A profile whose transform
moves no colour of a grid by more than one level is sRGB under another name, and costs nothing.
"""

import io
import logging
import threading
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

COLOR_PROFILES = ("convert", "ignore")
"""What happens to an embedded profile: the pixels are converted to sRGB by it, or taken as they are."""

LARGEST = 8 << 20
"""Bytes of a profile that is used: those of printers have about two million."""

_MODES = MappingProxyType({1: "L", 3: "RGB", 4: "CMYK"})
_SPACES = MappingProxyType({1: b"GRAY", 3: b"RGB ", 4: b"CMYK"})


def check_color_profile(value: str) -> None:
    """ValueError for a value that is not one of `COLOR_PROFILES`."""
    if value not in COLOR_PROFILES:
        raise ValueError(f"color_profile: {value!r} is not one of {', '.join(COLOR_PROFILES)}")


def to_srgb(pixels: np.ndarray, profile: bytes) -> np.ndarray:
    """Convert by the profile. pixels: uint8 H×W×C, C 1 grey, 3 RGB, 4 CMYK. The pixels themselves where the profile is sRGB.

    Returns uint8 H×W×3, or the pixels as they are, after one warning, where the profile is damaged or is for another colour space.
    """
    channels = pixels.shape[2]
    space = profile[16:20]
    if channels == 1 and space == _SPACES[3]:  # an RGB profile on a grey image
        pixels, channels = np.repeat(pixels, 3, axis=2), 3
    if not profile or space != _SPACES[channels] or len(profile) > LARGEST:
        if profile:
            _warn(f"it has {len(profile):,} bytes and the colour space {space!r}")
        return pixels
    transform = _transform(profile, channels)
    return pixels if transform is None else _applied(transform, pixels)


def _applied(transform: Any, pixels: np.ndarray) -> np.ndarray:
    from PIL import Image

    mode = _MODES[pixels.shape[2]]
    source = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if mode == "L" else pixels), mode)
    return np.asarray(transform.apply(source, source if mode == "RGB" else None))


@lru_cache(maxsize=16)
def _transform(profile: bytes, channels: int) -> Any | None:
    """The profile's transform to sRGB; None where it changes nothing or cannot be built."""
    from PIL import ImageCms

    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), _MODES[channels], "RGB"
        )
        grid = _grid(channels)
        moved = _applied(transform, grid)
    except Exception as error:  # LittleCMS reports damage in several types
        _warn(str(error))
        return None
    if channels == 4:
        return transform
    change = np.abs(moved.astype(np.int16) - grid)
    return transform if change.max() > 1 else None


def _grid(channels: int) -> np.ndarray:
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    return np.stack(np.meshgrid(*[levels] * channels, indexing="ij"), axis=-1).reshape(1, -1, channels)


_warned = threading.Event()


def _warn(why: str) -> None:
    """Log once a process: a folder of such files would fill the log."""
    if not _warned.is_set():
        _warned.set()
        log.warning("an image has an unusable colour profile, which is ignored (%s); later ones are not logged", why)
