"""Encoded pictures to uint8 RGB: JPEG by libjpeg-turbo, reduced and cropped where that is enough; everything else by Pillow."""

import io
import warnings
from typing import TYPE_CHECKING

import cv2
import numpy as np

from augment import jpeg
from augment.jpeg import SMALLEST_REDUCED, JpegError, Part, is_jpeg

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What Pillow is allowed to open."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

Box = tuple[int, int, int, int]

# How a stored picture is shown, by its EXIF orientation (JEITA CP-3451, tag 0x0112): transpose, then flip rows, then flip columns.
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class ImageError(ValueError):
    """The bytes are no picture that Refract reads; the message says why, for the picture's owner."""


class TooManyPixelsError(ImageError):
    """The header announces more pixels than the limit."""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels as shown (EXIF orientation applied), from the header alone. ImageError if it cannot be read."""
    header = _plain_jpeg(data)
    if header is not None:
        turned = _TURNS[jpeg.orientation(data, header)][0]
        return (header.width, header.height) if turned else (header.height, header.width)
    with _open(data) as image:
        return (image.width, image.height) if _orientation_of(image) >= 5 else (image.height, image.width)


def decode(data: bytes, *, max_pixels: int | None = None) -> np.ndarray:
    """Decode to a uint8 H×W×3 RGB array, EXIF orientation applied, transparency over white, 16 bit and CMYK reduced to RGB.

    max_pixels: refuse a header that announces more, before decoding. The first frame of several. Raises ImageError for bytes that are
    truncated, damaged or no picture, TooManyPixelsError over the limit.
    """
    return decode_part(data, None, max_pixels=max_pixels).pixels


def decode_part(
    data: bytes,
    box: Box | None,
    *,
    size: tuple[int, int] | None = None,
    scale: int = 1,
    max_pixels: int | None = None,
) -> Part:
    """As `decode`, but at least the pixels of `box`, and a JPEG reduced by `scale`.

    size: `image_size(data)`, where it is known; trusted. box: (top, left, height, width) in pixels as shown, inside the picture; None for
    all of it. scale: 1, 2, 4 or 8. What is no JPEG comes whole and at full scale, a very small JPEG at full scale. With a box, damage in
    what need not be decoded goes unnoticed.
    """
    if max_pixels is not None:
        _check_scans(data)  # strangers' bytes: what calls itself baseline may have thousands of scans too
        height, width = size or image_size(data)
        if height * width > max_pixels:
            raise TooManyPixelsError(
                f"the picture has {height}×{width} = {height * width:,} pixels; the limit is {max_pixels:,}"
            )
    header = _plain_jpeg(data)
    if header is None:
        return Part(_decode_with_pillow(data))
    orientation = jpeg.orientation(data, header)
    scale = scale if min(header.height, header.width) >= SMALLEST_REDUCED else 1
    try:
        if box is None:
            return _turned(Part(jpeg.decode_whole(data, header, scale), scale), orientation, header)
        return _turned(jpeg.decode_part(data, header, _stored(box, orientation, header), scale), orientation, header)
    except JpegError as error:
        raise ImageError(str(error)) from error


def _check_scans(data: bytes) -> None:
    try:
        if is_jpeg(data):
            jpeg.check_scans(data)
    except JpegError as error:
        raise ImageError(str(error)) from error


def _plain_jpeg(data: bytes) -> jpeg.JpegHeader | None:
    """The header of a JPEG whose colours libjpeg-turbo turns to RGB; None for CMYK and for what is no JPEG."""
    if not is_jpeg(data):
        return None
    try:
        header = jpeg.read_header(data)
        if not header.baseline:
            jpeg.check_scans(data)
    except JpegError as error:
        raise ImageError(str(error)) from error
    return header if header.components in (1, 3) else None


def _stored(box: Box, orientation: int, header: jpeg.JpegHeader) -> Box:
    """A box of the picture as shown, in the picture as stored."""
    transposed, rows, columns = _TURNS[orientation]
    shown_height, shown_width = (header.width, header.height) if transposed else (header.height, header.width)
    top, left, height, width = box
    top = shown_height - top - height if rows else top
    left = shown_width - left - width if columns else left
    return (left, top, width, height) if transposed else (top, left, height, width)


def _turned(part: Part, orientation: int, header: jpeg.JpegHeader) -> Part:
    """A part of the picture as stored, as the part of the picture as shown."""
    if orientation == 1:
        return part
    transposed, rows, columns = _TURNS[orientation]
    pixels, top, left = part.pixels, part.top, part.left
    height, width = header.height / part.scale, header.width / part.scale
    if transposed:
        pixels, top, left, height, width = pixels.transpose(1, 0, 2), left, top, width, height
    if rows:
        pixels, top = pixels[::-1], height - top - pixels.shape[0]
    if columns:
        pixels, left = pixels[:, ::-1], width - left - pixels.shape[1]
    return Part(np.ascontiguousarray(pixels), part.scale, top, left)


def _orientation_of(image: "Image.Image") -> int:
    """The EXIF orientation, 1…8, of an opened picture, without decoding it."""
    # Pillow turns a TIFF itself, and decodes a whole PNG to look for EXIF behind its pixels, where no camera puts it.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF, in all the ways in which Pillow's parsers fail: the pixels are good without it
        return 1
    return value if value in _TURNS else 1


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
        try:
            image.seek(0)
        except Exception as error:  # as in `_open`
            raise ImageError(f"damaged or truncated {image.format}") from error
        return from_pillow(image)


def from_pillow(image: "Image.Image") -> np.ndarray:
    """The image as `decode` gives it from its file: uint8 H×W×3 RGB, EXIF orientation applied, transparency over white.

    ImageError for a file, opened lazily, that is damaged, and for 32-bit floating-point pixels.
    """
    orientation = _orientation_of(image)
    try:
        image.load()
    except Exception as error:  # as in `_open`
        raise ImageError(f"damaged or truncated {image.format or 'image'}") from error
    pixels = _to_rgb(image)
    transposed, rows, columns = _TURNS[orientation]
    pixels = pixels.transpose(1, 0, 2) if transposed else pixels
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def _to_rgb(image: "Image.Image") -> np.ndarray:
    from PIL import Image

    if image.mode == "F":
        raise ImageError("32-bit floating-point pixels have no known range; save the picture with 8 or 16 bit")
    if image.mode.startswith(
        "I"
    ):  # one channel of 16 bit; Pillow clips these to white where it is asked to convert them
        grey = (np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8)
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if image.has_transparency_data:
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
