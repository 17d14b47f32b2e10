"""Encoded images to uint8 RGB: JPEG by libjpeg-turbo, reduced and cropped where that is enough; all else by
`refract.augment.decoding.full_decode`.

Whatever a decoder raises leaves this module as an `ImageError`, so that one bad file costs its caller one image.
"""

from typing import TYPE_CHECKING

import numpy as np

from refract.augment.decoding import jpeg, jpeg_repair
from refract.augment.decoding.color_profiles import to_srgb
from refract.augment.decoding.errors import ImageError, TooManyPixelsError, check_pixels
from refract.augment.decoding.exif import ORIENTATIONS
from refract.augment.decoding.formats import SUFFIXES
from refract.augment.decoding.full_decode import decode_whole, loaded, open_source, orientation_of, shown
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
    """(height, width) in pixels as shown (EXIF orientation applied), from the header alone. ImageError if it cannot be read."""
    with _BOUNDARY:
        header = _plain_jpeg(data)
        if header is not None:
            turned = ORIENTATIONS[jpeg.orientation(data, header)][0]
            return (header.width, header.height) if turned else (header.height, header.width)
        source = open_source(data)
        height, width = source.size
        return (width, height) if ORIENTATIONS[source.orientation][0] else (height, width)


def decode(data: bytes, *, max_pixels: int | None = None, color_profile: str = "ignore") -> np.ndarray:
    """Decode to a uint8 H×W×3 RGB array, EXIF orientation applied, transparency over white, other depths and CMYK reduced to RGB.

    max_pixels: refuse a header that announces more, before decoding. color_profile: of
    `refract.augment.decoding.color_profiles.COLOR_PROFILES`. The
    first frame of several. Raises ImageError for bytes that are truncated, damaged or not an image, TooManyPixelsError over the limit.
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
    """As `decode`, but at least the pixels of `box`, and a JPEG reduced by `scale`.

    size: `image_size(data)`, where it is known; trusted. box: (top, left, height, width) in pixels as shown, inside the image; None for
    all of it. scale: 1, 2, 4 or 8. Other formats are decoded whole and at full scale, a very small JPEG at full scale. With a box, damage
    in what need not be decoded goes unnoticed. MemoryError only with max_pixels, where the limit has allowed the size.
    """
    with _BOUNDARY if max_pixels is None else _LIMITED:
        if max_pixels is not None:
            if is_jpeg(data):  # untrusted input: a file that calls itself baseline may have thousands of scans too
                jpeg.check_scans(data)
            check_pixels(*(size or image_size(data)), max_pixels)
        header = _plain_jpeg(data)
        if header is None:
            return decode_whole(data, max_pixels, convert=color_profile == "convert")
        return _decode_jpeg(data, header, box, scale, convert=color_profile == "convert")


class _Boundary:
    """Turn all that decoders raise into ImageError. limited: let MemoryError pass, which is then the machine's and not the file's.

    A class, as contextlib's generators take a microsecond, and small images are decoded in twenty.
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


_BOUNDARY, _LIMITED = _Boundary(limited=False), _Boundary(limited=True)


def _as_image_error(error: Exception) -> ImageError:
    if isinstance(error, JpegError):
        return ImageError(str(error))
    if isinstance(error, MemoryError):
        return ImageError("decoding needs more memory than there is; the header may be damaged")
    # struct.error, zlib.error, cv2.error, OverflowError, SyntaxError, OSError… by library and version
    return ImageError(f"damaged image ({type(error).__name__}: {' '.join(str(error).split())[:120]})")


def _plain_jpeg(data: bytes) -> jpeg.JpegHeader | None:
    """The header of a JPEG whose colours libjpeg-turbo converts to RGB; None for CMYK and other formats."""
    if not is_jpeg(data):
        return None
    header = jpeg.read_header(data)
    if not header.baseline:
        jpeg.check_scans(data)
    if header.precision != 8:
        raise ImageError(f"JPEG of {header.precision} bits is not read; save the image as 8-bit JPEG or PNG")
    return header if header.components in (1, 3) else None


def _decode_jpeg(data: bytes, header: jpeg.JpegHeader, box: Box | None, scale: int, *, convert: bool) -> Part:
    orientation = jpeg.orientation(data, header)
    scale = scale if min(header.height, header.width) >= SMALLEST_REDUCED else 1
    try:
        if box is None:
            part = Part(jpeg.decode_whole(data, header, scale), scale)
        else:
            part = jpeg.decode_part(data, header, _stored(box, orientation, header), scale)
    except JpegError as error:
        part = _decode_repaired(data, header, scale, error)
    if convert and header.profile and (profile := jpeg.profile_of(data, header)):
        part = part._replace(pixels=_converted(part.pixels, profile, grey=header.components == 1))
    return _turned(part, orientation, header)


def _decode_repaired(data: bytes, header: jpeg.JpegHeader, scale: int, error: JpegError) -> Part:
    """Decode a JPEG whose structure is damaged and whose data are complete. JpegError where they are not."""
    data, remarks = jpeg_repair.tidied(data) or (data, [])
    tries, found = jpeg_repair.TRIES - 1, _pixels_or_error(data, header, scale)
    while isinstance(found, JpegError) and (places := jpeg_repair.extraneous(data, str(found))):
        # A cut in front of the right one takes data away, which gives another message; one behind it changes nothing in front of it.
        low, high = 0, len(places)
        best: tuple[bytes, np.ndarray | JpegError] | None = None
        while low < high and tries and not isinstance(found, np.ndarray):
            middle, tries = (low + high) // 2, tries - 1
            mended = data[: places[middle][0]] + data[places[middle][1] :]
            found = _pixels_or_error(mended, header, scale)
            if isinstance(found, JpegError) and not jpeg_repair.reports_extraneous(str(found)):
                low = middle + 1
            else:
                high, best = middle, (mended, found)
        if best is None or (low < high and isinstance(best[1], JpegError)):
            break
        (data, found), remarks = best, list(dict.fromkeys([*remarks, "bytes behind its data"]))
    if isinstance(found, JpegError):
        raise error
    return Part(found, scale, remarks=(f"repaired JPEG: {' and '.join(remarks)}",) if remarks else ())


def _pixels_or_error(data: bytes, header: jpeg.JpegHeader, scale: int) -> np.ndarray | JpegError:
    try:
        return jpeg.decode_whole(data, header, scale)
    except JpegError as error:
        return error


def _converted(pixels: np.ndarray, profile: bytes, *, grey: bool = False) -> np.ndarray:
    """RGB pixels by their profile; grey: three equal channels."""
    if grey and profile[16:20] == b"GRAY":
        converted = to_srgb(pixels[..., :1], profile)
        return converted if converted.shape[2] == 3 else pixels
    return to_srgb(pixels, profile)


def _stored(box: Box, orientation: int, header: jpeg.JpegHeader) -> Box:
    """A box of the image as shown, in the image as stored."""
    transposed, rows, columns = ORIENTATIONS[orientation]
    shown_height, shown_width = (header.width, header.height) if transposed else (header.height, header.width)
    top, left, height, width = box
    top = shown_height - top - height if rows else top
    left = shown_width - left - width if columns else left
    return (left, top, width, height) if transposed else (top, left, height, width)


def _turned(part: Part, orientation: int, header: jpeg.JpegHeader) -> Part:
    """A part of the image as stored, as the part of the image as shown."""
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
    """The image as `decode` gives it from its file: uint8 H×W×3 RGB, EXIF orientation applied, transparency over white.

    ImageError for a file, opened lazily, that is damaged, and for pixels without a known range (modes F, and I beyond 16 bits).
    """
    with _BOUNDARY:
        profile = image.info.get("icc_profile") if color_profile == "convert" else None
        pixels = loaded(image, profile if isinstance(profile, bytes) else b"")
        return shown(pixels, orientation_of(image))
