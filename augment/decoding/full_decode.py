"""Decode whole files to uint8 RGB by Pillow and `refract.augment.decoding.tiff`: CMYK JPEG and every other format.

These functions propagate the decoders' errors; `refract.augment.decoding.decode` converts them to `ImageError`.
"""

import io
import warnings
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from refract.augment.decoding import exif, jpeg, jpeg_repair, png, tiff
from refract.augment.decoding.bit_depth import to_eight_bits
from refract.augment.decoding.color_profiles import to_srgb
from refract.augment.decoding.errors import ImageError, TooManyPixelsError, check_pixels
from refract.augment.decoding.exif import ORIENTATIONS
from refract.augment.decoding.formats import READ, format_of, unsupported_message
from refract.augment.decoding.jpeg import Part, is_jpeg

if TYPE_CHECKING:
    from PIL import Image


class _UnknownKindError(ImageError):
    """Pillow has no reader for this variant of a format that it supports."""


class Source(NamedTuple):
    """An opened file of another format than JPEG.

    size: (height, width) as stored. layout: the layout of a TIFF. image: the Pillow image, not yet decoded; None for a TIFF that Pillow
    does not read correctly. chunks: the chunks of a PNG.
    """

    size: tuple[int, int]
    orientation: int
    layout: tiff.Layout | None = None
    image: "Image.Image | None" = None
    chunks: png.Chunks | None = None


def open_source(data: bytes) -> Source:
    """Read the header of a file that is not a JPEG. ImageError for an unsupported format or a damaged header."""
    if not data:
        raise ImageError("no bytes: the file is empty")
    name = format_of(data)
    if name not in READ:
        raise ImageError(unsupported_message(data, name))
    if name == "TIFF":
        layout = tiff.read_layout(data)
        orientation = layout.orientation if layout.orientation in ORIENTATIONS else 1
        if not layout.for_pillow:
            return Source(layout.size, orientation, layout=layout)
        # Pillow rotates a TIFF itself.
        try:
            image = _open(data, "TIFF")
        except _UnknownKindError:  # a variant that Pillow does not support, such as CMYK with transparency
            return Source(layout.size, orientation, layout=layout)
        _widen_palette(image)
        return Source((image.height, image.width), 1, layout=layout, image=image)
    chunks = png.read_chunks(data) if name == "PNG" else None
    image = _open(data, name)
    if chunks is not None:
        _scale_transparent_level(image, chunks.depth)
    return Source((image.height, image.width), orientation_of(image, chunks), image=image, chunks=chunks)


def _widen_palette(image: "Image.Image") -> None:
    """Read a TIFF's palette as 8-bit colours if none exceeds 8 bits, as some writers store them. Pillow takes the upper 8 of 16 bits."""
    from PIL import ImagePalette
    from PIL.TiffImagePlugin import TiffImageFile

    colours = image.tag_v2.get(320, ()) if isinstance(image, TiffImageFile) and image.mode in ("P", "PA") else ()
    if colours and max(colours) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))


def _scale_transparent_level(image: "Image.Image", depth: int) -> None:
    """Scale a PNG's transparent level to 8 bits: Pillow scales only the pixels. Ignores bits above `depth`."""
    level, largest = image.info.get("transparency"), 2**depth - 1
    if image.mode == "L" and isinstance(level, int) and depth <= 8:
        image.info["transparency"] = (level & largest) * 255 // largest
    elif image.mode == "RGB" and isinstance(level, tuple) and depth == 8:
        image.info["transparency"] = tuple(part & 255 for part in level)


def orientation_of(image: "Image.Image", chunks: png.Chunks | None = None) -> int:
    """Return the orientation, 1…8, of an opened image, without decoding it."""
    if chunks is not None and (chunks.exif or chunks.text):
        return exif.orientation(chunks.exif, chunks.xmp())
    info = image.info
    if "exif" in info or "xmp" in info:
        return exif.orientation(info.get("exif") or b"", info.get("xmp") or b"")
    # Pillow rotates a TIFF itself. It decodes a whole PNG to find EXIF data after the pixels, which `chunks` contains already.
    if image.format == "TIFF" or (image.format == "PNG" and "Raw profile type exif" not in info):
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF data raise many types; the pixels are still valid
        return 1
    return value if value in ORIENTATIONS else 1


def _open(data: bytes, name: str) -> "Image.Image":
    """Open the image without decoding it. _UnknownKindError if Pillow has no reader for this variant of the format."""
    from PIL import Image, UnidentifiedImageError

    if name == "HEIC" and not _heif_opener():
        raise ImageError(unsupported_message(data, name))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the caller's limit replaces Pillow's bomb warning
            return Image.open(
                io.BytesIO(data), formats=("HEIF" if name == "HEIC" else name, *(("MPO",) if name == "JPEG" else ()))
            )
    except UnidentifiedImageError as error:
        raise _UnknownKindError(f"damaged {name}: its header cannot be read; save the image again, as JPEG") from error
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(f"the image has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from error
    except Exception as error:  # for hostile bytes, Pillow's parsers raise struct.error, SyntaxError, OSError…
        raise ImageError(f"damaged {name}: its header cannot be read; save the image again, as JPEG") from error


def _heif_opener() -> bool:
    """Register the HEIC reader of `pillow-heif` (the extra `heif`). Returns whether it is installed."""
    from PIL import Image

    if "HEIF" not in Image.OPEN:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            return False
        register_heif_opener()
    return True


def decode_whole(data: bytes, limit: int | None, *, convert: bool) -> Part:
    """Decode a CMYK JPEG or another format, EXIF orientation applied. limit: most pixels. convert: to sRGB, by the embedded profile."""
    if is_jpeg(data):  # a CMYK JPEG
        return _decode_cmyk_jpeg(data, convert=convert)
    source = open_source(data)
    if limit is not None:
        check_pixels(*source.size, limit)
    if source.image is None:
        assert source.layout is not None
        raster = tiff.read_raster(data, source.layout)
        pixels = _flattened(raster, source.layout.profile if convert else b"")
        return Part(apply_orientation(pixels, source.orientation), remarks=_depth_remarks(source.layout, raster))
    with source.image as image:
        profile = _profile_of(image, source) if convert else b""
        pixels = load_pixels(image, profile, wide_png=data if source.chunks and source.chunks.depth == 16 else b"")
    return Part(apply_orientation(pixels, source.orientation))


def _decode_cmyk_jpeg(data: bytes, *, convert: bool) -> Part:
    """Decode by Pillow, which supports Adobe's inverted CMYK."""
    data, repairs = jpeg_repair.repair_structure(data, strict=False) or (data, [])
    remarks = (f"repaired JPEG: {' and '.join(repairs)}",) if repairs else ()
    with _open(data, "JPEG") as image:
        orientation = jpeg.orientation(data, jpeg.read_header(data))
        profile = image.info.get("icc_profile") or b"" if convert else b""
        return Part(apply_orientation(load_pixels(image, profile), orientation), remarks=remarks)


def _profile_of(image: "Image.Image", source: Source) -> bytes:
    if source.layout is not None:
        return source.layout.profile
    profile = source.chunks.profile() if source.chunks is not None else image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) else b""


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and flip stored pixels H×W×C to upright pixels. orientation: EXIF's, 1…8."""
    transposed, rows, columns = ORIENTATIONS[orientation]
    pixels = pixels.transpose(1, 0, 2) if transposed else pixels
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def load_pixels(image: "Image.Image", profile: bytes, *, wide_png: bytes = b"") -> np.ndarray:
    """Decode a Pillow image to uint8 H×W×3. profile: ICC profile to convert by; empty for none.

    wide_png: the file's bytes, for a PNG of 16 bits per sample. Pillow keeps only 8 of them for colour images.
    """
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as in `_open`
        raise ImageError(f"damaged or truncated {image.format or 'image'}") from error
    if image.mode in ("F", "LAB"):
        reason = "32-bit floating-point pixels have no known range" if image.mode == "F" else "CIELab is not supported"
        raise ImageError(f"{reason}; save the image as 8-bit or 16-bit grey or RGB")
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
    """Convert a raster to uint8 H×W×3, by its profile to sRGB, with transparency over white."""
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
    """Return a remark for samples with fewer bits than their type: the rule of `bit_depth` makes them nearly black."""
    if layout.high or not 0 < raster.largest <= 0.25:
        return ()
    used = raster.largest * (2.0 ** layout.bits[0] - 1)
    return (
        f"nearly black: its samples reach {used:.0f} of {layout.bits[0]} bits; set SMaxSampleValue if they have fewer bits",
    )
