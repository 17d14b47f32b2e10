"""Encoded images to uint8 RGB: JPEG by libjpeg-turbo, reduced and cropped where that is enough; all else by Pillow and `augment.tiff`.

Whatever a decoder raises leaves this module as an `ImageError`, so that one bad file costs its caller one image.
"""

import io
import warnings
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from augment import exif, jpeg, jpeg_repair, png, tiff
from augment.depth import to_eight_bits
from augment.formats import READ, SUFFIXES, format_of, refusal
from augment.image_error import ImageError, TooManyPixelsError
from augment.jpeg import SMALLEST_REDUCED, JpegError, Part, is_jpeg
from augment.profiles import to_srgb

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

# How a stored image is shown, by its EXIF orientation (JEITA CP-3451, tag 0x0112): transpose, then flip rows, then flip columns.
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


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels as shown (EXIF orientation applied), from the header alone. ImageError if it cannot be read."""
    with _BOUNDARY:
        header = _plain_jpeg(data)
        if header is not None:
            turned = _TURNS[jpeg.orientation(data, header)][0]
            return (header.width, header.height) if turned else (header.height, header.width)
        source = _source(data)
        height, width = source.size
        return (width, height) if _TURNS[source.orientation][0] else (height, width)


def decode(data: bytes, *, max_pixels: int | None = None, color_profile: str = "ignore") -> np.ndarray:
    """Decode to a uint8 H×W×3 RGB array, EXIF orientation applied, transparency over white, other depths and CMYK reduced to RGB.

    max_pixels: refuse a header that announces more, before decoding. color_profile: of `augment.profiles.COLOR_PROFILES`. The first frame
    of several. Raises ImageError for bytes that are truncated, damaged or not an image, TooManyPixelsError over the limit.
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
            _check_pixels(*(size or image_size(data)), max_pixels)
        header = _plain_jpeg(data)
        if header is None:
            return _decode_whole(data, max_pixels, convert=color_profile == "convert")
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


def _check_pixels(height: int, width: int, limit: int) -> None:
    if height * width > limit:
        raise TooManyPixelsError(f"the image has {height}×{width} = {height * width:,} pixels; the limit is {limit:,}")


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
    transposed, rows, columns = _TURNS[orientation]
    shown_height, shown_width = (header.width, header.height) if transposed else (header.height, header.width)
    top, left, height, width = box
    top = shown_height - top - height if rows else top
    left = shown_width - left - width if columns else left
    return (left, top, width, height) if transposed else (top, left, height, width)


def _turned(part: Part, orientation: int, header: jpeg.JpegHeader) -> Part:
    """A part of the image as stored, as the part of the image as shown."""
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
    return Part(np.ascontiguousarray(pixels), part.scale, top, left, part.remarks)


class _Source(NamedTuple):
    """An opened file of another format than JPEG. size: (height, width) as stored. layout: of a TIFF that Pillow does not read right;
    image: of everything else, not yet decoded; chunks: of a PNG."""

    size: tuple[int, int]
    orientation: int
    layout: tiff.Layout | None = None
    image: "Image.Image | None" = None
    chunks: png.Chunks | None = None


def _source(data: bytes) -> _Source:
    if not data:
        raise ImageError("no bytes: the file is empty")
    name = format_of(data)
    if name not in READ:
        raise ImageError(refusal(data, name))
    if name == "TIFF":
        layout = tiff.read_layout(data)
        orientation = layout.orientation if layout.orientation in _TURNS else 1
        if not layout.for_pillow:
            return _Source(layout.size, orientation, layout=layout)
        # Pillow rotates a TIFF itself.
        image = _open(data, "TIFF", f"a {layout} is not read; save it as 8-bit or 16-bit grey or RGB")
        return _Source((image.height, image.width), 1, layout=layout, image=image)
    chunks = png.read_chunks(data) if name == "PNG" else None
    image = _open(data, name)
    return _Source((image.height, image.width), _orientation_of(image, chunks), image=image, chunks=chunks)


def _orientation_of(image: "Image.Image", chunks: png.Chunks | None = None) -> int:
    """The orientation, 1…8, of an opened image, without decoding it."""
    if chunks is not None and (chunks.exif or chunks.text):
        return exif.orientation(chunks.exif, chunks.xmp())
    info = image.info
    if "exif" in info or "xmp" in info:
        return exif.orientation(info.get("exif") or b"", info.get("xmp") or b"")
    # Pillow rotates a TIFF itself, and decodes a whole PNG to look for EXIF behind its pixels, which `chunks` has read.
    if image.format == "TIFF" or (image.format == "PNG" and "Raw profile type exif" not in info):
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF, in all the ways in which Pillow's parsers fail: the pixels are good without it
        return 1
    return value if value in _TURNS else 1


def _open(data: bytes, name: str, otherwise: str | None = None) -> "Image.Image":
    """The image, not yet decoded. otherwise: the message where Pillow has no reader for this kind of the format."""
    from PIL import Image, UnidentifiedImageError

    if name == "HEIC" and not _heif_opener():
        raise ImageError(refusal(data, name))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: the limit is the caller's
            return Image.open(
                io.BytesIO(data), formats=("HEIF" if name == "HEIC" else name, *(("MPO",) if name == "JPEG" else ()))
            )
    except UnidentifiedImageError as error:
        raise ImageError(
            otherwise or f"damaged {name}: its header cannot be read; save the image again, as JPEG"
        ) from error
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(f"the image has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from error
    except (
        Exception
    ) as error:  # Pillow's parsers raise all sorts (struct.error, SyntaxError, OSError…) on hostile bytes
        raise ImageError(f"damaged {name}: its header cannot be read; save the image again, as JPEG") from error


def _heif_opener() -> bool:
    """Whether Pillow reads HEIC: by the package `pillow-heif`, of the extra `heif`."""
    from PIL import Image

    if "HEIF" not in Image.OPEN:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            return False
        register_heif_opener()
    return True


def _decode_whole(data: bytes, limit: int | None, *, convert: bool) -> Part:
    if is_jpeg(data):  # CMYK
        return _decode_cmyk_jpeg(data, convert=convert)
    source = _source(data)
    if limit is not None:
        _check_pixels(*source.size, limit)
    if source.image is None:
        assert source.layout is not None
        raster = tiff.read_raster(data, source.layout)
        pixels = _flattened(raster, source.layout.profile if convert else b"")
        return Part(_shown(pixels, source.orientation), remarks=_depth_remarks(source.layout, raster))
    with source.image as image:
        profile = _profile_of(image, source) if convert else b""
        pixels = _loaded(image, profile, wide_png=data if source.chunks and source.chunks.depth == 16 else b"")
    return Part(_shown(pixels, source.orientation))


def _decode_cmyk_jpeg(data: bytes, *, convert: bool) -> Part:
    """By Pillow, which knows Adobe's inverted CMYK."""
    data, mended = jpeg_repair.tidied(data, strict=False) or (data, [])
    remarks = (f"repaired JPEG: {' and '.join(mended)}",) if mended else ()
    with _open(data, "JPEG") as image:
        orientation = jpeg.orientation(data, jpeg.read_header(data))
        profile = image.info.get("icc_profile") or b"" if convert else b""
        return Part(_shown(_loaded(image, profile), orientation), remarks=remarks)


def _profile_of(image: "Image.Image", source: _Source) -> bytes:
    if source.layout is not None:
        return source.layout.profile
    profile = source.chunks.profile() if source.chunks is not None else image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) else b""


def from_pillow(image: "Image.Image", *, color_profile: str = "ignore") -> np.ndarray:
    """The image as `decode` gives it from its file: uint8 H×W×3 RGB, EXIF orientation applied, transparency over white.

    ImageError for a file, opened lazily, that is damaged, and for pixels without a known range (modes F, and I beyond 16 bits).
    """
    with _BOUNDARY:
        profile = image.info.get("icc_profile") if color_profile == "convert" else None
        pixels = _loaded(image, profile if isinstance(profile, bytes) else b"")
        return _shown(pixels, _orientation_of(image))


def _shown(pixels: np.ndarray, orientation: int) -> np.ndarray:
    transposed, rows, columns = _TURNS[orientation]
    pixels = pixels.transpose(1, 0, 2) if transposed else pixels
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def _loaded(image: "Image.Image", profile: bytes, *, wide_png: bytes = b"") -> np.ndarray:
    """uint8 H×W×3. wide_png: the bytes of a PNG of 16 bits a sample, of which Pillow keeps 8 where it has colours."""
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as in `_open`
        raise ImageError(f"damaged or truncated {image.format or 'image'}") from error
    if image.mode in ("F", "LAB"):
        name = "32-bit floating-point pixels have no known range" if image.mode == "F" else "CIELab pixels are not read"
        raise ImageError(f"{name}; save the image as 8-bit or 16-bit grey or RGB")
    if image.mode.startswith("I"):
        return _grey_of_sixteen_bits(image, profile)
    if wide_png and isinstance(image.info.get("transparency"), tuple):
        samples = np.asarray(cv2.imdecode(np.frombuffer(wide_png, np.uint8), cv2.IMREAD_UNCHANGED))
        levels = to_eight_bits(samples, 0, 65535)
        return _flattened(tiff.Raster(levels[..., 2::-1], levels[..., 3], False), profile)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        channels = 1 if image.mode in ("L", "LA") and profile[16:20] == b"GRAY" else 3
        return _flattened(tiff.Raster(rgba[..., :channels], rgba[..., 3], False), profile)
    if not profile or image.mode == "1":
        return np.array(image.convert("RGB"))
    plain = np.asarray(image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB"))
    return _flattened(tiff.Raster(plain if plain.ndim == 3 else plain[..., None], None, False), profile)


def _grey_of_sixteen_bits(image: "Image.Image", profile: bytes) -> np.ndarray:
    values = np.asarray(image)
    if values.size and image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise ImageError(
            f"32-bit pixels of {values.min()} to {values.max()} have no known range; save the image with 8 or 16 bits"
        )
    values, transparent = values.astype(np.uint16), image.info.get("transparency")
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8) if isinstance(transparent, int) else None
    return _flattened(tiff.Raster(to_eight_bits(values, 0, 65535)[..., None], alpha, False), profile)


def _flattened(raster: tiff.Raster, profile: bytes) -> np.ndarray:
    """A raster as uint8 H×W×3 in sRGB, transparency over white."""
    from PIL import Image

    colour, alpha = raster.colour, raster.alpha
    if raster.premultiplied and alpha is not None:
        opacity = np.maximum(alpha, 1)[..., None].astype(np.uint32)
        colour = np.minimum((colour * np.uint32(255) + opacity // 2) // opacity, 255).astype(np.uint8)
    if profile:
        colour = to_srgb(colour, profile)
    if colour.shape[2] == 4:
        colour = np.asarray(Image.fromarray(np.ascontiguousarray(colour), "CMYK").convert("RGB"))
    if colour.shape[2] == 1:
        colour = cv2.cvtColor(np.ascontiguousarray(colour), cv2.COLOR_GRAY2RGB)
    if alpha is None:
        return np.ascontiguousarray(colour)
    rgba = Image.fromarray(np.dstack([colour, alpha]), "RGBA")
    return np.array(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))


def _depth_remarks(layout: tiff.Layout, raster: tiff.Raster) -> tuple[str, ...]:
    """A remark on data of fewer bits than their type, which the rule of `augment.depth` makes nearly black."""
    if layout.high or not 0 < raster.largest <= 0.25:
        return ()
    used = raster.largest * (2.0 ** layout.bits[0] - 1)
    return (
        f"nearly black: its samples reach {used:.0f} of {layout.bits[0]} bits; set SMaxSampleValue if they have fewer bits",
    )
