"""Convert pixels to sRGB by their embedded colour profile (ICC.1), with LittleCMS.

A transform is built once per profile and applied to 8-bit pixels, after a JPEG is reduced and cropped. If the transform changes no colour
of a test grid by more than one level, the profile is equivalent to sRGB and the pixels stay unchanged.
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
"""Use of an embedded profile: convert the pixels to sRGB, or ignore the profile."""

MAX_PROFILE_BYTES = 8 << 20
"""Larger profiles are ignored. Printer profiles have about two million bytes."""

_MODES = MappingProxyType({1: "L", 3: "RGB", 4: "CMYK"})
_SPACES = MappingProxyType({1: b"GRAY", 3: b"RGB ", 4: b"CMYK"})


def check_color_profile(value: str) -> None:
    """Check that a value is one of `COLOR_PROFILES`; ValueError otherwise."""
    if value not in COLOR_PROFILES:
        raise ValueError(f"color_profile: {value!r} is not one of {', '.join(COLOR_PROFILES)}")


def to_srgb(pixels: np.ndarray, profile: bytes) -> np.ndarray:
    """Convert pixels to sRGB by their profile. pixels: uint8 H×W×C, with C = 1 for grey, 3 for RGB, 4 for CMYK.

    Returns uint8 H×W×3, or the unchanged pixels if the profile is equivalent to sRGB, damaged or for another colour space. The last two
    cases log one warning per process.
    """
    channels = pixels.shape[2]
    space = profile[16:20]
    if channels == 1 and space == _SPACES[3]:  # an RGB profile on a grey image
        pixels, channels = np.repeat(pixels, 3, axis=2), 3
    if not profile or space != _SPACES[channels] or len(profile) > MAX_PROFILE_BYTES:
        if profile:
            _warn_once(f"it has {len(profile):,} bytes and the colour space {space!r}")
        return pixels
    transform = _transform(profile, channels)
    return pixels if transform is None else _apply(transform, pixels)


def changes_colors(profile: bytes) -> bool:
    """Whether `to_srgb` changes colour pixels with this profile."""
    if not profile or profile[16:20] != _SPACES[3] or len(profile) > MAX_PROFILE_BYTES:
        return False
    return _transform(profile, 3) is not None


def _apply(transform: Any, pixels: np.ndarray) -> np.ndarray:
    from PIL import Image

    mode = _MODES[pixels.shape[2]]
    source = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if mode == "L" else pixels), mode)
    return np.asarray(transform.apply(source, source if mode == "RGB" else None))


@lru_cache(maxsize=16)
def _transform(profile: bytes, channels: int) -> Any | None:
    """Return the profile's transform to sRGB; None if it changes nothing or cannot be built."""
    from PIL import ImageCms

    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), _MODES[channels], "RGB"
        )
        grid = _grid(channels)
        converted = _apply(transform, grid)
    except Exception as error:  # LittleCMS raises several types for damaged profiles
        _warn_once(str(error))
        return None
    if channels == 4:
        return transform
    change = np.abs(converted.astype(np.int16) - grid)
    return transform if change.max() > 1 else None


def _grid(channels: int) -> np.ndarray:
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    return np.stack(np.meshgrid(*[levels] * channels, indexing="ij"), axis=-1).reshape(1, -1, channels)


_warned = threading.Event()


def _warn_once(reason: str) -> None:
    """Log one warning per process: a folder of such files would fill the log."""
    if not _warned.is_set():
        _warned.set()
        log.warning("an image has an unusable colour profile, which is ignored (%s); later ones are not logged", reason)
