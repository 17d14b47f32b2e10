"""Encoded pictures to uint8 RGB: JPEG by libjpeg-turbo, at a reduced scale where that is enough; everything else by Pillow."""

import io
import warnings
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What Pillow is allowed to open."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# What numpy does to a decoded JPEG for each EXIF orientation (JEITA CP-3451, tag 0x0112).
_ORIENT = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[:, ::-1],
    7: lambda image: image.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda image: image.transpose(1, 0, 2)[::-1],
}


class ImageError(ValueError):
    """The bytes are no picture that Refract reads; the message says why, for the picture's owner."""


class TooManyPixelsError(ImageError):
    """The header announces more pixels than the limit."""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels as shown (EXIF orientation applied), from the header alone. ImageError if it cannot be read."""
    if _is_plain_jpeg(data):
        height, width, _, _ = _jpeg_header(data)
        return (width, height) if _orientation(data) >= 5 else (height, width)
    with _open(data) as image:
        return (image.width, image.height) if _orientation_of(image) >= 5 else (image.height, image.width)


def decode(data: bytes, *, max_pixels: int | None = None, needed: tuple[float, float] | None = None) -> np.ndarray:
    """Decode to a uint8 H×W×3 RGB array, EXIF orientation applied, transparency over white, 16 bit and CMYK reduced to RGB.

    max_pixels: refuse a header that announces more, before decoding. needed: (vertical, horizontal) by how much the picture may be
    reduced; a JPEG then may come at the smallest scale n/8 that is no smaller (`scale_of` tells which). The first frame of several.
    Raises ImageError for bytes that are truncated, damaged or no picture, TooManyPixelsError over the limit.
    """
    if max_pixels is not None:
        height, width = image_size(data)
        if height * width > max_pixels:
            raise TooManyPixelsError(
                f"the picture has {height}×{width} = {height * width:,} pixels; the limit is {max_pixels:,}"
            )
    if not _is_plain_jpeg(data):
        return _decode_with_pillow(data)
    orientation = _orientation(data)
    options = {}
    if needed is not None and min(needed) >= 2:
        height, width, _, _ = _jpeg_header(data)
        vertical, horizontal = needed[::-1] if orientation >= 5 else needed
        options = {
            "min_height": int(np.ceil(height / vertical)),
            "min_width": int(np.ceil(width / horizontal)),
            "min_factor": 2,
        }
    try:
        image = simplejpeg.decode_jpeg(data, "RGB", **options)
    except ValueError as error:
        raise ImageError(f"damaged or truncated JPEG ({str(error).rstrip('.')})") from error
    return _oriented(image, orientation)


def scale_of(decoded: int, full: int) -> float:
    """The n/8 by which `decode` reduced a side of `full` pixels to `decoded`. (It rounds up, so their ratio is not quite it.)"""
    return round(8 * decoded / full) / 8 if decoded != full else 1.0


def _is_plain_jpeg(data: bytes) -> bool:
    """A JPEG whose colours libjpeg-turbo turns to RGB; not CMYK."""
    return data[:3] == b"\xff\xd8\xff" and _jpeg_header(data)[2] not in ("CMYK", "YCCK")


def _jpeg_header(data: bytes) -> tuple[int, int, str, str]:
    try:
        return simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise ImageError(f"damaged or truncated JPEG header ({error})") from error


def _orientation(data: bytes) -> int:
    """The EXIF orientation, 1…8, of a JPEG."""
    # Parsing EXIF takes longer than the header; most pictures of a data set have none.
    if data.find(b"Exif\x00\x00", 0, 1 << 18) < 0:
        return 1
    with _open(data) as image:
        return _orientation_of(image)


def _orientation_of(image: "Image.Image") -> int:
    """The EXIF orientation, 1…8, of an opened picture, without decoding it."""
    # Pillow turns a TIFF itself, and decodes a whole PNG to look for EXIF behind its pixels, where no camera puts it.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF, in all the ways in which Pillow's parsers fail: the pixels are good without it
        return 1
    return value if value in range(1, 9) else 1


def _open(data: bytes) -> "Image.Image":
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError("no bytes: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: the limit is the caller's
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(f"not a picture that can be read ({_kind(data)}); accepted: {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(f"the picture has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from error
    except (
        Exception
    ) as error:  # Pillow's parsers raise all sorts (struct.error, SyntaxError, OSError…) on hostile bytes
        raise ImageError("damaged picture: its header cannot be read") from error


def _decode_with_pillow(data: bytes) -> np.ndarray:
    with _open(data) as image:
        orientation = _orientation_of(image)
        try:
            image.seek(0)
            image.load()
        except Exception as error:  # as above
            raise ImageError(f"damaged or truncated {image.format}") from error
        return _oriented(_to_rgb(image), orientation)


def _oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    return np.ascontiguousarray(_ORIENT[orientation](pixels)) if orientation in _ORIENT else pixels


def _to_rgb(image: "Image.Image") -> np.ndarray:
    from PIL import Image

    if image.mode == "F":
        raise ImageError("32-bit floating-point pixels have no known range; save the picture with 8 or 16 bit")
    if image.mode.startswith(
        "I"
    ):  # one channel of 16 bit; Pillow clips these to white where it is asked to convert them
        grey = (np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8)
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


def _kind(data: bytes) -> str:
    start = data[:512]
    if b"\x00" not in start:
        try:
            start.decode("utf-8")
            return "it looks like text"
        except UnicodeDecodeError:
            pass
    return f"it starts with the bytes {start[:4].hex(' ')}"
