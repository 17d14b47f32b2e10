"""Decode images to uint8 RGB: JPEG by libjpeg-turbo, reduced and cropped as needed; the usual BMP, cropped; others by
`refract.augment.decoding.full_decode`.

This module converts every decoder error to `ImageError`, so that a bad file costs the caller one image.
"""

from typing import TYPE_CHECKING

import numpy as np

from refract.augment.decoding import bmp, jpeg, jpeg_repair
from refract.augment.decoding.color_profiles import to_srgb
from refract.augment.decoding.errors import ImageError, TooManyPixelsError, check_pixels
from refract.augment.decoding.exif import ORIENTATIONS
from refract.augment.decoding.formats import SUFFIXES
from refract.augment.decoding.full_decode import (
    apply_orientation,
    decode_whole,
    load_pixels,
    open_source,
    orientation_of,
)
from refract.augment.decoding.jpeg import SMALLEST_REDUCED, JpegError, Part, is_jpeg

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "SUFFIXES",
    "ImageError",
    "TooManyPixelsError",
    "decode",
    "decode_part",
    "from_pillow",
    "image_size",
    "is_jpeg",
]

Box = tuple[int, int, int, int]


def image_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) in pixels with the EXIF orientation applied. Reads the header only. ImageError if it cannot be read."""
    with _ERRORS:
        header = _plain_jpeg(data)
        if header is not None:
            transposed = ORIENTATIONS[jpeg.orientation(data, header)][0]
            return (header.width, header.height) if transposed else (header.height, header.width)
        if (bitmap := bmp.read_layout(data)) is not None:
            return bitmap.size
        source = open_source(data)
        height, width = source.size
        return (width, height) if ORIENTATIONS[source.orientation][0] else (height, width)


def decode(data: bytes, *, max_pixels: int | None = None, color_profile: str = "ignore") -> np.ndarray:
    """Decode to a uint8 H×W×3 RGB array. Of several frames, decode the first.

    Applies the EXIF orientation, lays transparency over white, and converts other bit depths and CMYK to 8-bit RGB.
    max_pixels: refuse a header that declares more, before decoding.
    color_profile: one of `refract.augment.decoding.color_profiles.COLOR_PROFILES`.
    Raises ImageError for bytes that are truncated, damaged or not an image, and TooManyPixelsError above the limit.
    """
    return decode_part(data, None, max_pixels=max_pixels, color_profile=color_profile).pixels


def decode_part(
    data: bytes,
    box: Box | None,
    *,
    size: tuple[int, int] | None = None,
    scale: int = 1,
    max_pixels: int | None = None,
    color_profile: str = "ignore",
) -> Part:
    """As `decode`, but decode at least the pixels of `box`, and reduce a JPEG by `scale`.

    size: `image_size(data)` if the caller knows it; trusted.
    box: (top, left, height, width) inside the image, in pixels with the orientation applied; None for the whole image.
    scale: 1, 2, 4 or 8.
    Other formats than JPEG and the usual BMP are decoded whole; all but JPEG, and a very small JPEG, at full scale. With a box, damage
    outside the decoded part is not detected.
    MemoryError only with max_pixels, for a size below the limit.
    """
    with _ERRORS if max_pixels is None else _LIMITED_ERRORS:
        if max_pixels is not None:
            if is_jpeg(data):  # untrusted input: a file declared as baseline may also have thousands of scans
                jpeg.check_scans(data)
            check_pixels(*(size or image_size(data)), max_pixels)
        header = _plain_jpeg(data)
        if header is None:
            if (bitmap := bmp.read_layout(data)) is not None:
                box = box or (0, 0, *bitmap.size)
                return Part(bmp.read_pixels(data, bitmap, box), top=box[0], left=box[1])
            return decode_whole(data, max_pixels, convert=color_profile == "convert")
        return _decode_jpeg(data, header, box, scale, convert=color_profile == "convert")


class _DecoderErrors:
    """Convert every exception of a decoder to ImageError.

    limited: propagate MemoryError; after the pixel limit's check, it is the machine's fault and not the file's.
    A class, since contextlib's generators take a microsecond, and decoding a small image takes twenty.
    """

    __slots__ = ("limited",)

    def __init__(self, *, limited: bool) -> None:
        self.limited = limited

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, ImageError) or not isinstance(error, Exception):
            return
        if not (isinstance(error, MemoryError) and self.limited):
            raise _as_image_error(error) from error


_ERRORS, _LIMITED_ERRORS = _DecoderErrors(limited=False), _DecoderErrors(limited=True)


def _as_image_error(error: Exception) -> ImageError:
    if isinstance(error, JpegError):
        return ImageError(str(error))
    if isinstance(error, MemoryError):
        return ImageError("decoding needs more memory than is available; the header may be damaged")
    # The types depend on library and version: struct.error, zlib.error, cv2.error, OverflowError, SyntaxError, OSError…
    return ImageError(f"damaged image ({type(error).__name__}: {' '.join(str(error).split())[:120]})")


def _plain_jpeg(data: bytes) -> jpeg.JpegHeader | None:
    """Return the header of a JPEG that libjpeg-turbo converts to RGB; None for CMYK and other formats."""
    if not is_jpeg(data):
        return None
    header = jpeg.read_header(data)
    if not header.baseline:
        jpeg.check_scans(data)
    if header.precision != 8:
        raise ImageError(f"JPEG of {header.precision} bits is not supported; save the image as 8-bit JPEG or PNG")
    return header if header.components in (1, 3) else None


def _decode_jpeg(data: bytes, header: jpeg.JpegHeader, box: Box | None, scale: int, *, convert: bool) -> Part:
    orientation = jpeg.orientation(data, header)
    scale = scale if min(header.height, header.width) >= SMALLEST_REDUCED else 1
    try:
        if box is None:
            part = Part(jpeg.decode_whole(data, header, scale), scale)
        else:
            part = jpeg.decode_part(data, header, _to_stored(box, orientation, header), scale)
    except JpegError as error:
        part = _decode_repaired(data, header, scale, error)
    if convert and header.profile and (profile := jpeg.profile_of(data, header)):
        part = part._replace(pixels=_to_srgb(part.pixels, profile, grey=header.components == 1))
    return _oriented(part, orientation, header)


def _decode_repaired(data: bytes, header: jpeg.JpegHeader, scale: int, error: JpegError) -> Part:
    """Decode a JPEG with a damaged structure and complete data. Raises `error` if the data are incomplete."""
    data, remarks = jpeg_repair.repair_structure(data) or (data, [])
    tries, result = jpeg_repair.MAX_DECODES - 1, _pixels_or_error(data, header, scale)
    while isinstance(result, JpegError) and (spans := jpeg_repair.extraneous_spans(data, str(result))):
        # Bisect for the right span. Cutting an earlier span removes valid data, which changes the message; a later one keeps the message.
        low, high = 0, len(spans)
        best: tuple[bytes, np.ndarray | JpegError] | None = None
        while low < high and tries and not isinstance(result, np.ndarray):
            middle, tries = (low + high) // 2, tries - 1
            repaired = data[: spans[middle][0]] + data[spans[middle][1] :]
            result = _pixels_or_error(repaired, header, scale)
            if isinstance(result, JpegError) and not jpeg_repair.reports_extraneous(str(result)):
                low = middle + 1
            else:
                high, best = middle, (repaired, result)
        if best is None or (low < high and isinstance(best[1], JpegError)):
            break
        (data, result), remarks = best, list(dict.fromkeys([*remarks, "bytes after its data"]))
    if isinstance(result, JpegError):
        raise error
    return Part(result, scale, remarks=(f"repaired JPEG: {' and '.join(remarks)}",) if remarks else ())


def _pixels_or_error(data: bytes, header: jpeg.JpegHeader, scale: int) -> np.ndarray | JpegError:
    try:
        return jpeg.decode_whole(data, header, scale)
    except JpegError as error:
        return error


def _to_srgb(pixels: np.ndarray, profile: bytes, *, grey: bool = False) -> np.ndarray:
    """Convert RGB pixels to sRGB by their profile. grey: the three channels are equal."""
    if grey and profile[16:20] == b"GRAY":
        converted = to_srgb(pixels[..., :1], profile)
        return converted if converted.shape[2] == 3 else pixels
    return to_srgb(pixels, profile)


def _to_stored(box: Box, orientation: int, header: jpeg.JpegHeader) -> Box:
    """Convert a box of the upright image to the box of the stored image."""
    transposed, rows, columns = ORIENTATIONS[orientation]
    upright_height, upright_width = (header.width, header.height) if transposed else (header.height, header.width)
    top, left, height, width = box
    top = upright_height - top - height if rows else top
    left = upright_width - left - width if columns else left
    return (left, top, width, height) if transposed else (top, left, height, width)


def _oriented(part: Part, orientation: int, header: jpeg.JpegHeader) -> Part:
    """Convert a part of the stored image to the part of the upright image."""
    if orientation == 1:
        return part
    transposed, rows, columns = ORIENTATIONS[orientation]
    pixels, top, left = part.pixels, part.top, part.left
    height, width = header.height / part.scale, header.width / part.scale
    if transposed:
        pixels, top, left, height, width = pixels.transpose(1, 0, 2), left, top, width, height
    if rows:
        pixels, top = pixels[::-1], height - top - pixels.shape[0]
    if columns:
        pixels, left = pixels[:, ::-1], width - left - pixels.shape[1]
    return Part(np.ascontiguousarray(pixels), part.scale, top, left, part.remarks)


def from_pillow(image: "Image.Image", *, color_profile: str = "ignore") -> np.ndarray:
    """Convert a Pillow image as `decode` converts its file: uint8 H×W×3 RGB, EXIF orientation applied, transparency over white.

    ImageError if the image's lazily opened file is damaged, or for pixels without a known range (mode F; mode I beyond 16 bits).
    """
    with _ERRORS:
        profile = image.info.get("icc_profile") if color_profile == "convert" else None
        pixels = load_pixels(image, profile if isinstance(profile, bytes) else b"")
        return apply_orientation(pixels, orientation_of(image))
