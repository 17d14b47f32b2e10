"""Read a TIFF's first directory, and the pixels of every layout that Pillow clips, inverts or refuses.

Pillow reads files of at most 8 bits per sample. This module reads all others: 9 to 64 bits, signed and floating-point samples, both byte
orders, chunky and planar, strips and tiles. It interprets every tag that decides the meaning of a sample, except colour profiles.
Source: TIFF 6.0; TIFF Technical Note 3 (floating-point predictor); BigTIFF.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from refract.augment.decoding.bit_depth import to_eight_bits
from refract.augment.decoding.errors import ImageError

MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 274, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _SUB_DIRECTORIES = 317, 322, 323, 324, 325, 330
_EXTRA, _FORMAT, _LOW, _HIGH, _SUBSAMPLING, _PROFILE, _DNG = 338, 339, 340, 341, 530, 34675, 50706
_RAW = (32803, 34892)  # photometric: colour filter array, linear raw
_TYPES = dict(zip((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 18), "BcHI_bBhi_fdIQqQ", strict=True))
_COLOURS = {0: 1, 1: 1, 2: 3, 5: 4}  # photometric → channels that carry colour
_NAMES = {
    0: "grey",
    1: "grey",
    2: "RGB",
    3: "palette",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELab",
    9: "ICCLab",
    32844: "LogL",
    32845: "LogLuv",
}
_USED = frozenset({
    _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR,
    _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _SUB_DIRECTORIES, _EXTRA, _FORMAT, _LOW, _HIGH, _SUBSAMPLING,
    _PROFILE, _DNG,
})  # fmt: skip
_MAX_TILE_PIXELS = 1 << 24  # a tile of at most this size may be larger than the image
_UNPACKED_SAMPLES = 1 << 16  # unpacked at once
_MAX_VALUES = 1 << 20  # of one tag: the largest images have about as many strips or tiles
_UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED = 1, 2, 3, 4
_KINDS = {_UNSIGNED: "u", _SIGNED: "i", _FLOAT: "f"}
Range = tuple[float, ...]
_DEFLATE = (8, 32946)
_BY_PILLOW = (5, 34925, 32773, 50000)  # LZW, LZMA, PackBits, Zstandard: libtiff decompresses them to bytes


@dataclass(frozen=True)
class Layout:
    """The pixel layout that the first directory declares.

    size: (height, width) as stored. bits: the bits of each sample. form: 1 unsigned or undefined, 2 signed, 3 floating point.
    low, high: the declared range of each sample; empty if undeclared. block: (height, width) of a strip or tile.
    """

    order: str
    size: tuple[int, int]
    bits: tuple[int, ...]
    form: int
    photometric: int
    compression: int
    predictor: int
    planar: bool
    extra: tuple[int, ...]
    orientation: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    profile: bytes
    block: tuple[int, int]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def for_pillow(self) -> bool:
        """Whether Pillow decodes this layout correctly."""
        if self.form != _UNSIGNED or not set(self.bits) <= {1, 2, 4, 8}:
            return False
        if set(self.low) - {0.0} or set(self.high) - {2.0 ** self.bits[0] - 1}:
            return False
        readable = self.compression == 1 or self.compression in _DEFLATE + _BY_PILLOW
        if self.planar and readable and self.photometric in _COLOURS:
            return False  # Pillow confuses the planes of extra channels
        return not (self.photometric in (0, 1) and len(self.bits) > 1 and not set(self.extra) & {1, 2})

    def __str__(self) -> str:
        kind = {_SIGNED: "signed ", _FLOAT: "floating-point "}.get(self.form, "")
        count = len(self.bits)
        name = _NAMES.get(self.photometric, f"photometric {self.photometric}")
        return f"TIFF of {count} {kind}{name} channel{'s' * (count > 1)} of {self.bits[0]} bits"


@dataclass(frozen=True)
class Raster:
    """8-bit pixels before compositing.

    colour: uint8 H×W×C, with C = 1 for grey, 3 for RGB, 4 for CMYK. alpha: uint8 H×W, or None.
    largest: the largest colour sample as a fraction of its range; 1 if unknown.
    """

    colour: np.ndarray
    alpha: np.ndarray | None
    premultiplied: bool
    largest: float = 1.0


def read_layout(data: bytes) -> Layout:
    """Read the first directory. ImageError if it is damaged, and for camera raw files."""
    try:
        order, tags, read = _first_directory(data)
        _check_not_raw(tags, read)
        layout = _layout(order, tags)
        _check_ycbcr(layout, tags)
        return layout
    except (struct.error, LookupError, ValueError, OverflowError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError("damaged or truncated TIFF (its directory cannot be read)") from error


def read_raster(data: bytes, layout: Layout) -> Raster:
    """Read all pixels as stored, mapped to 8 bits by the rule of `bit_depth`. ImageError names an unsupported layout."""
    colours = _color_channels(layout)
    ranges = _ranges(layout)
    samples = _samples(data, layout)
    levels = [to_eight_bits(samples[..., i], *ranges[i]) for i in range(colours)]
    colour = np.stack(levels, axis=-1)
    largest = float(samples[..., :colours].max()) / ranges[0][1] if layout.form == _UNSIGNED else 1.0
    if layout.photometric == 0:
        colour = 255 - colour
    kind = next((value for value in layout.extra if value in (1, 2)), 0)
    if not kind:
        return Raster(colour, None, False, largest)
    channel = colours + layout.extra.index(kind)
    if channel >= len(layout.bits):
        raise ImageError(f"damaged {layout}: it declares an alpha channel that it does not have")
    return Raster(colour, to_eight_bits(samples[..., channel], *ranges[channel]), kind == 1, largest)


def _first_directory(data: bytes) -> tuple[str, dict[int, tuple[Any, ...]], Any]:
    """Return (byte order, tags of the first directory, function that reads a directory by its offset)."""
    order = "<" if data[:1] == b"I" else ">"
    (big,) = struct.unpack_from(order + "H", data, 2)
    read = partial(_directory, data, order, big == 43)
    (offset,) = struct.unpack_from(order + ("Q" if big == 43 else "I"), data, 8 if big == 43 else 4)
    return order, read(offset), read


def _directory(data: bytes, order: str, big: bool, offset: int) -> dict[int, tuple[Any, ...]]:
    """Return tag → values for the tags that this module uses. Of duplicate tags, the first counts.

    ValueError if the tags' values exceed the file's size, since Pillow copies the values of every tag.
    """
    head, word, step = ("Q", "Q", 20) if big else ("H", "I", 12)
    (count,) = struct.unpack_from(order + head, data, offset)
    if not 0 < count <= 4096:
        raise ValueError(f"{count} entries")
    start = offset + struct.calcsize(order + head)
    inline = struct.calcsize(order + word)
    tags: dict[int, tuple[Any, ...]] = {}
    announced = 0
    for entry in range(start, start + count * step, step):
        tag, kind, length = struct.unpack_from(order + "HH" + word, data, entry)
        form = _TYPES.get(kind, "_")
        if form == "_":
            continue
        if length > len(data):
            raise ValueError(f"tag {tag} has {length} values")
        value_at, size = entry + 4 + inline, length * struct.calcsize(order + form)
        if size > inline:
            (value_at,) = struct.unpack_from(order + word, data, value_at)
            announced += size
            if announced > 2 * len(data):  # twice the file's size: some programs let two tags share a value
                raise ValueError("its tags share their values")
        if tag not in _USED or tag in tags or (tag == _PROFILE and kind not in (1, 2, 7)):
            continue
        if length > _MAX_VALUES and tag != _PROFILE:
            raise ValueError(f"tag {tag} has {length} values")
        if kind in (1, 2, 7):
            if value_at + length > len(data):
                raise ValueError(f"tag {tag} ends beyond the end of the file")
            tags[tag] = (data[value_at : value_at + length],)
        else:
            tags[tag] = struct.unpack_from(f"{order}{length}{form}", data, value_at)
    return tags


def _check_not_raw(tags: dict[int, tuple[Any, ...]], read: Any) -> None:
    """ImageError for camera raw files. read: reads a directory by its offset."""
    directories = [tags]
    for offset in tags.get(_SUB_DIRECTORIES, ())[:8]:
        try:
            directories.append(read(offset))
        except (struct.error, TypeError, ValueError):
            continue
    if _DNG in tags or any(entry.get(_PHOTOMETRIC, (0,))[:1] in ((_RAW[0],), (_RAW[1],)) for entry in directories):
        raise ImageError("camera raw is not supported; develop it and save it as JPEG or 16-bit TIFF")


def _check_ycbcr(layout: Layout, tags: dict[int, tuple[Any, ...]]) -> None:
    """ImageError for uncompressed YCbCr that is subsampled or in planes, which Pillow decodes incorrectly.

    Without the subsampling tag, TIFF's default is 2×2. A file with a colour sample for each pixel is not subsampled, despite a missing tag.
    """
    if layout.photometric != 6 or layout.compression != 1:
        return
    factors = tags.get(_SUBSAMPLING)
    full = 3 * layout.size[0] * layout.size[1]
    subsampled = factors != (1, 1) and (factors or sum(layout.lengths) < full)
    if subsampled or layout.planar:
        across, down = (factors or (2, 2))[:2]
        variant = f"{across}×{down} colour subsampling" if subsampled else "planes"
        raise ImageError(f"an uncompressed {layout} with {variant} is not supported; save it as 8-bit RGB")


def _layout(order: str, tags: dict[int, tuple[Any, ...]]) -> Layout:
    """Return the layout that the tags declare. ValueError for a missing tag or an impossible value."""

    def single(tag: int, default: int | None = None) -> int:
        values = tags.get(tag) or (default,)
        value = values[0] if not isinstance(values[0], bytes) else values[0][0]
        if value is None:
            raise ValueError(f"tag {tag} is missing")
        return int(value)

    def several(tag: int) -> tuple[Any, ...]:
        values = tags.get(tag, ())
        return tuple(values[0]) if values and isinstance(values[0], bytes) else values

    width, height, samples = single(_WIDTH), single(_HEIGHT), single(_SAMPLES, 1)
    if width < 1 or height < 1 or not 1 <= samples <= 1024:
        raise ValueError(f"{height}×{width} pixels of {samples} samples")
    tiled = _TILES in tags
    block = (
        (single(_TILE_HEIGHT), single(_TILE_WIDTH)) if tiled else (min(single(_ROWS, height), height) or height, width)
    )
    if min(block) < 1 or max(block) > 1 << 24:
        raise ValueError(f"blocks of {block}")
    bits = several(_BITS) or (1,)
    bits = tuple(map(int, bits * samples if len(bits) == 1 else bits[:samples]))
    forms = {_UNSIGNED if form == _UNDEFINED else form for form in several(_FORMAT)} or {_UNSIGNED}
    form = int(next(iter(forms))) if len(forms) == 1 else 0
    profile = tags.get(_PROFILE, (b"",))[0]
    low, high = (tuple(map(float, several(tag))) for tag in (_LOW, _HIGH))
    no_levels = bits == (1,) * len(bits) or single(_PHOTOMETRIC, 1) in (3, 6)  # palette, YCbCr
    # Some writers declare the range 0 to 0.
    unusable = form == _UNSIGNED and not _usable(*_complete_range(low, high, bits), len(bits))
    if no_levels or unusable:
        low = high = ()
    return Layout(
        order=order,
        size=(height, width),
        bits=bits,
        form=form,
        photometric=single(_PHOTOMETRIC, 1),
        compression=single(_COMPRESSION, 1) * (-1 if single(_FILL_ORDER, 1) == 2 else 1),
        predictor=single(_PREDICTOR, 1),
        planar=single(_PLANAR, 1) == 2 and samples > 1,
        extra=tuple(map(int, several(_EXTRA))),
        orientation=single(_ORIENTATION, 1),
        low=low,
        high=high,
        profile=profile if isinstance(profile, bytes) else b"",
        block=block,
        offsets=several(_TILES if tiled else _STRIPS),
        lengths=several(_TILE_BYTES if tiled else _STRIP_BYTES),
    )


def _color_channels(layout: Layout) -> int:
    """Return the number of colour channels. ImageError for an unsupported layout."""
    remedy = "save it as 8-bit or 16-bit grey or RGB"
    colours = _COLOURS.get(layout.photometric)
    bits = set(layout.bits)
    whole = bits <= ({16, 32, 64} if layout.form == _FLOAT else {8, 16, 32, 64})
    packed = layout.form == _UNSIGNED and len(bits) == 1 and max(bits) < 32 and layout.predictor == 1
    unsupported = colours is None or layout.form not in _KINDS or len(bits) != 1 or not (whole or packed)
    if unsupported or colours is None or len(layout.bits) < colours:
        raise ImageError(f"a {layout} is not supported; {remedy}")
    if colours == 1 and len(layout.bits) > 1 and not set(layout.extra) & {1, 2}:
        raise ImageError(f"a {len(layout.bits)}-channel TIFF without colour or alpha is not supported; {remedy}")
    if layout.compression != 1 and layout.compression not in _DEFLATE + _BY_PILLOW:
        name = f"compression {layout.compression}" if layout.compression > 0 else "reversed bit order"
        raise ImageError(f"a {layout} with {name} is not supported; {remedy}")
    if layout.predictor not in (1, 2, 3) or (layout.predictor == 3) != (
        layout.predictor == 3 and layout.form == _FLOAT
    ):
        raise ImageError(f"a {layout} with predictor {layout.predictor} is not supported; {remedy}")
    return colours


def _ranges(layout: Layout) -> list[tuple[float, float]]:
    """Return the range (low, high) of each sample. ImageError if it is unknown or unusable."""
    count, low, high = len(layout.bits), layout.low, layout.high
    if layout.form == _UNSIGNED:
        low, high = _complete_range(low, high, layout.bits)
    elif not low or not high:
        raise ImageError(
            f"a {layout} has no known range; save it as unsigned 8 or 16 bits, or set SMinSampleValue and SMaxSampleValue"
        )
    low, high = (values * count if len(values) == 1 else values for values in (low, high))
    if not _usable(low, high, count):
        raise ImageError(
            f"a {layout} declares the unusable range {low[:4]} to {high[:4]} (SMinSampleValue, SMaxSampleValue)"
        )
    return list(zip(low, high, strict=False))


def _complete_range(low: Range, high: Range, bits: Sequence[int]) -> tuple[Range, Range]:
    """Return (low, high) with a value for each unsigned sample. Undeclared ends take the limits of the bits."""
    count = len(bits)
    low, high = (values * count if len(values) == 1 else values for values in (low, high))
    return low or (0.0,) * count, high or tuple(2.0**count - 1 for count in bits)


def _usable(low: Sequence[float], high: Sequence[float], count: int) -> bool:
    """Whether each of `count` samples has a finite range that is not empty."""
    if min(len(low), len(high)) < count:
        return False
    return all(-1e300 < a < b < 1e300 for a, b in zip(low, high, strict=False))


def _samples(data: bytes, layout: Layout) -> np.ndarray:
    """Read the samples, H×W×S in the file's type. ImageError for truncated data or impossible sizes."""
    (height, width), (rows, columns) = layout.size, layout.block
    planes, each = (len(layout.bits), 1) if layout.planar else (1, len(layout.bits))
    down, across = -(-height // rows), -(-width // columns)
    blocks = planes * down * across
    if len(layout.offsets) < blocks or (layout.lengths and len(layout.lengths) < blocks):
        raise ImageError(f"damaged or truncated TIFF: it has {len(layout.offsets)} of {blocks} strips or tiles")
    if height * width * each * planes * layout.bits[0] // 8 > max(1 << 26, 4096 * len(data)):
        raise ImageError("damaged or truncated TIFF: it has too little data for its pixels")
    if rows * columns > max(_MAX_TILE_PIXELS, 4 * height * width):
        raise ImageError(f"damaged TIFF: tiles of {rows}×{columns} for an image of {height}×{width}")
    tiled = columns != width or rows > height
    pixels: np.ndarray | None = None
    for number in range(blocks):
        plane, (y, x) = number // (down * across), divmod(number % (down * across), across)
        block_rows = rows if tiled or (y + 1) * rows <= height else height - y * rows
        packed = _block_bytes(data, layout, number, block_rows, columns * each)
        values = _unpack(packed, layout, block_rows, columns, each)
        if pixels is None:
            pixels = np.zeros((height, width, len(layout.bits)), values.dtype)
        part = pixels[y * rows : (y + 1) * rows, x * columns : (x + 1) * columns, plane : plane + each]
        part[...] = values[: part.shape[0], : part.shape[1]]
    assert pixels is not None
    return pixels


def _block_bytes(data: bytes, layout: Layout, number: int, rows: int, samples: int) -> bytes:
    """Decompress a strip or tile. ImageError if it is too short."""
    offset, across = layout.offsets[number], -(-samples * layout.bits[0] // 8)
    expected = across * rows
    length = layout.lengths[number] if layout.lengths else expected
    stored = data[offset : offset + length]
    if layout.compression == 1:
        block = stored[:expected]
    elif layout.compression in _DEFLATE:
        try:
            block = zlib.decompressobj().decompress(stored, expected)
        except zlib.error as error:
            raise ImageError(f"damaged or truncated TIFF ({error})") from error
    else:
        block = _decompress_by_pillow(stored, layout.compression, rows, across)
    if len(block) < expected or len(stored) < (length if layout.compression != 1 else expected):
        raise ImageError("damaged or truncated TIFF: a strip or tile is too short")
    return block


def _decompress_by_pillow(stored: bytes, compression: int, rows: int, across: int) -> bytes:
    """Decompress by Pillow's libtiff, which reads the bytes as an 8-bit grey image of rows × across pixels."""
    from PIL import Image
    from PIL.TiffImagePlugin import TiffImageFile

    fields = {
        _WIDTH: across, _HEIGHT: rows, _BITS: 8, _COMPRESSION: compression, _PHOTOMETRIC: 1,
        _STRIPS: 8 + 2 + 9 * 12 + 4, _SAMPLES: 1, _ROWS: rows, _STRIP_BYTES: len(stored),
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    file = b"II*\x00" + struct.pack("<IH", 8, len(fields)) + entries + struct.pack("<I", 0) + stored
    try:
        with TiffImageFile(io.BytesIO(file)) as image:
            # A preallocated image bypasses Pillow's pixel limit; `_samples` has checked the size.
            image.im = Image.new("L", image.size).im
            return image.tobytes()
    except Exception as error:  # libtiff's errors have many types
        raise ImageError("damaged or truncated TIFF (its data cannot be decompressed)") from error


def _unpack(packed: bytes, layout: Layout, rows: int, columns: int, each: int) -> np.ndarray:
    """Return rows×columns×each samples in native byte order, with the predictor reversed."""
    bits = layout.bits[0]
    if bits not in (8, 16, 32, 64):
        stored = np.frombuffer(packed, np.uint8).reshape(rows, -1)
        return _unpack_bits(stored, bits, columns * each).reshape(rows, columns, each)
    if layout.predictor == 3:
        raw = np.frombuffer(packed, np.uint8).reshape(rows, -1, each)
        summed = np.add.accumulate(raw, axis=1, dtype=np.uint8).reshape(rows, bits // 8, -1)
        joined = np.ascontiguousarray(summed.transpose(0, 2, 1)).view(f">f{bits // 8}")
        return joined.reshape(rows, columns, each).astype(f"=f{bits // 8}")
    kind = f"{_KINDS[layout.form]}{bits // 8}"
    values = np.frombuffer(packed, f"{layout.order}{kind}").reshape(rows, columns, each).astype(f"={kind}")
    if layout.predictor == 2:
        plain = values.view(f"=u{bits // 8}")  # differences wrap around, also for signed and floating-point samples
        values = np.add.accumulate(plain, axis=1, dtype=plain.dtype).view(values.dtype)
    return values


def _unpack_bits(stored: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return rows×count samples of `bits` bits in the smallest type. stored: uint8 rows×bytes, each row padded to whole bytes.

    Unpacks one block of samples at a time, since each unpacked bit takes a byte.
    """
    rows = len(stored)
    values = np.zeros((rows, count), np.uint8 if bits < 8 else np.uint16 if bits < 16 else np.uint32)
    wide = min(count, _UNPACKED_SAMPLES)
    tall = max(1, _UNPACKED_SAMPLES // wide)
    for top, left in product(range(0, rows, tall), range(0, count, wide)):
        part = values[top : top + tall, left : left + wide]
        first = left * bits // 8  # exact, since a block has a multiple of 8 samples
        block = stored[top : top + tall, first : first + -(-part.shape[1] * bits // 8)]
        single_bits = np.unpackbits(block, axis=1)[:, : part.shape[1] * bits].reshape(*part.shape, bits)
        for bit in range(bits):
            part <<= 1
            part |= single_bits[..., bit]
    return values
