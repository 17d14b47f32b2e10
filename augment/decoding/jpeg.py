"""Read JPEG headers, and decode only the required part of a JPEG, by libjpeg-turbo.

The TurboJPEG 3 library of the package `turbojpeg` decodes a part, by its cropping region. It does not read the rows below the part; the
rows above and the columns left and right pass through the entropy decoder only. On a machine without a wheel of that package,
`simplejpeg` decodes the whole image, to the same pixels. This module ignores EXIF orientations: see `refract.augment.decoding.decode`.
"""

import ctypes
import importlib.util
import re
import threading
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import simplejpeg

from refract.augment.decoding.exif import orientation as exif_orientation

SCALES = (1, 2, 4, 8)
"""Factors by which decoding may reduce the sides: those for which libjpeg-turbo has SIMD code."""

SMALLEST_REDUCED = 16
"""Shorter sides, in pixels, are not reduced: simplejpeg receives a size, which fits several scales of so small an image."""

MAX_SCANS = 100
"""Most scans of a decoded JPEG. Encoders write about ten; each of a decompression bomb's thousands costs a pass over all pixels."""


class JpegError(ValueError):
    """libjpeg-turbo cannot decode the bytes as a JPEG. The message names the reason."""


class JpegHeader(NamedTuple):
    """The frame header of a JPEG, and the positions of its metadata.

    height, width: pixels as stored. components: 1 grey, 3 colour, 4 CMYK. baseline: a sequential frame, usually with one scan.
    exif, xmp, profile: (start, end) of the data of these segments; a profile may have several. precision: bits per sample.
    rgb: whether the components may be R, G and B in place of Y, Cb and Cr, by an Adobe segment or their ids. huffman: a baseline, extended
    or progressive frame with Huffman coding, as nearly all files have.
    """

    height: int
    width: int
    components: int
    baseline: bool
    exif: tuple[int, int] | None = None
    xmp: tuple[int, int] | None = None
    profile: tuple[tuple[int, int], ...] = ()
    precision: int = 8
    rgb: bool = False
    huffman: bool = True


class Part(NamedTuple):
    """A decoded part of an image.

    pixels: uint8 H×W×3. scale: factor 1, 2, 4 or 8 by which both sides were reduced.
    top, left: start of the part in the reduced image, in its pixels.
    remarks: notes for the owner of the file, such as repairs.
    """

    pixels: np.ndarray
    scale: int = 1
    top: float = 0
    left: float = 0
    remarks: tuple[str, ...] = ()


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # a marker that ends entropy-coded data
_WITH_SEGMENT = frozenset(range(0xC0, 0x100)) - set(range(0xD0, 0xDA)) - {0xC8, *range(0xF0, 0xFE)}
_EXIF, _XMP, _PROFILE = b"Exif\x00\x00", b"http://ns.adobe.com/xap/1.0/\x00", b"ICC_PROFILE\x00"
# The transform is the segment's last byte, 0 for RGB (Adobe Technical Note 5116, section 18).
_ADOBE, _TRANSFORM = b"Adobe", 11


def read_header(data: bytes) -> JpegHeader:  # noqa: C901 — one branch for each kind of marker
    """Read the markers up to the frame header. JpegError if the frame is missing or invalid. (ITU-T T.81, annex B.)

    Stray bytes between segments are skipped, as in libjpeg.
    """
    position, end = 2, len(data)
    exif = xmp = None
    rgb = False
    profile: list[tuple[int, int]] = []
    while position + 4 <= end:
        if data[position] != 0xFF:
            position = data.find(b"\xff", position)
            if position < 0:
                break
            continue
        marker = data[position + 1]
        if marker == 0xFF:  # any number of fill bytes may precede a marker
            position += 1
            continue
        if marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment, and stray bytes
            position += 2
            continue
        length = data[position + 2] << 8 | data[position + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = data[position + 4 : position + 10]
            if len(frame) < 6 or length < 8:
                break
            height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
            if not height or not width:
                raise JpegError("damaged or truncated JPEG header (a side of 0 pixels)")
            baseline = marker in (0xC0, 0xC1)
            rgb = rgb or data[position + 10 : position + 17 : 3] == b"RGB"
            huffman = marker in (0xC0, 0xC1, 0xC2)
            return JpegHeader(height, width, frame[5], baseline, exif, xmp, tuple(profile), frame[0], rgb, huffman)
        if marker in (0xD9, 0xDA) or length < 2:  # end of image or start of scan before any frame
            break
        body = position + 4
        if marker == 0xE1 and exif is None and data.startswith(_EXIF, body):
            exif = (body, position + 2 + length)
        elif marker == 0xE1 and xmp is None and data.startswith(_XMP, body):
            xmp = (body + len(_XMP), position + 2 + length)
        elif marker == 0xE2 and data.startswith(_PROFILE, body):
            profile.append((body + len(_PROFILE), position + 2 + length))
        elif marker == 0xEE and data.startswith(_ADOBE, body):
            rgb = data[body + _TRANSFORM : body + _TRANSFORM + 1] == b"\x00"
        position += 2 + length
    raise JpegError("damaged or truncated JPEG header (no frame found)")


def orientation(data: bytes, header: JpegHeader) -> int:
    """Return the orientation, 1…8, from EXIF or else XMP; 1 if it is missing or cannot be read."""
    if header.exif is None and header.xmp is None:
        return 1
    exif, xmp = (b"" if span is None else data[span[0] : span[1]] for span in (header.exif, header.xmp))
    return exif_orientation(exif, xmp)


def profile_of(data: bytes, header: JpegHeader) -> bytes:
    """Return the embedded ICC profile; empty if it is missing or incomplete. (ICC.1:2022, B.4.)"""
    parts = sorted(
        (data[start], data[start + 2 : end]) for start, end in header.profile if start + 2 <= min(end, len(data))
    )
    counts = {data[start + 1] for start, end in header.profile if start + 2 <= min(end, len(data))}
    if [number for number, _ in parts] != list(range(1, len(parts) + 1)) or counts != {len(parts)}:
        return b""
    return b"".join(part for _, part in parts)


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (code, start, end) of each segment, up to and including the end marker. data: starts with SOI.

    start: the start of the marker. end: after the segment; for SOS, before the entropy-coded data. (ITU-T T.81, annex B.)
    """
    position = 2
    while match := _MARKER.search(data, position):
        start, code = match.start(), data[match.start() + 1]
        if code == 0xD9:
            yield code, start, start + 2
            return
        position = start + 2
        if code in _WITH_SEGMENT:  # after other codes, libjpeg skips no length
            position += max(2, int.from_bytes(data[position : position + 2]))
            yield code, start, position


def check_scans(data: bytes) -> None:
    """Check that a JPEG has at most `MAX_SCANS` scans, by counting markers, before libjpeg decodes them. JpegError otherwise."""
    if data.count(b"\xff\xda") <= MAX_SCANS:
        return
    scans = sum(code == 0xDA for code, _, _ in segments(data))  # excludes those in metadata and after the image
    if scans > MAX_SCANS:
        raise JpegError(f"a JPEG of {scans:,} scans; at most {MAX_SCANS} are decoded")


def decode_whole(data: bytes, header: JpegHeader, scale: int = 1) -> np.ndarray:
    """Decode all pixels to uint8 H×W×3, each side reduced by `scale` and rounded up. JpegError for damaged or truncated data.

    scale: one of `SCALES`; 1 for a side below `SMALLEST_REDUCED`.
    """
    options = {}
    if scale > 1:
        options = {"min_height": -(-header.height // scale), "min_width": -(-header.width // scale), "min_factor": 2}
    try:
        return simplejpeg.decode_jpeg(data, "RGB", **options)
    except (ValueError, OverflowError, SystemError) as error:
        raise JpegError(f"damaged or truncated JPEG ({str(error).rstrip('.')})") from error


def decode_part(data: bytes, header: JpegHeader, box: tuple[int, int, int, int], scale: int = 1) -> Part:
    """Decode at least the pixels of `box`, equal to those of `decode_whole`. JpegError for damaged or truncated data.

    box: (top, left, height, width) inside the image, in stored pixels. Damage below the box is not detected.
    """
    decoder = _decoder()
    try:
        part = decoder.decode(data, box, scale) if decoder is not None else None
    except JpegError:
        del _thread.decoder  # TurboJPEG would report this file's damage for every later file
        raise
    return Part(decode_whole(data, header, scale), scale) if part is None else part


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class _Fraction(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("num", "denom")]


# From turbojpeg.h, version 3: parameters, the pixel format, and a block's sides for each chroma subsampling.
_STOP_ON_WARNING, _SUBSAMPLING, _WIDTH, _HEIGHT = 0, 4, 5, 6
_RGB = 0
_BLOCK = {0: (8, 8), 1: (8, 16), 2: (16, 16), 3: (8, 8), 4: (16, 8), 5: (8, 32), 6: (32, 8)}  # (height, width)


class _PartDecoder:
    """One TurboJPEG decompressor. Threads must not share it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._handle = library.tj3Init(1)
        if not self._handle:
            raise MemoryError("TurboJPEG could not create a decompressor")
        library.tj3Set(self._handle, _STOP_ON_WARNING, 1)

    def __del__(self) -> None:
        self._library.tj3Destroy(self._handle)

    def decode(self, data: bytes, box: tuple[int, int, int, int], scale: int) -> Part | None:
        """Decode at least the pixels of `box`; None if TurboJPEG does not report the block size of the chroma subsampling."""
        library, handle = self._library, self._handle
        self._check(library.tj3DecompressHeader(handle, data, len(data)))
        block = _BLOCK.get(library.tj3Get(handle, _SUBSAMPLING))
        if block is None:
            return None
        height, width = (-(-library.tj3Get(handle, side) // scale) for side in (_HEIGHT, _WIDTH))
        across = -(-block[1] // scale)
        # Two pixels more on every side: subsampled chroma is interpolated from neighbours, which are missing at the region's edge.
        # The region's left side must be at a block's edge; its other three sides are free.
        top, left = max(0, box[0] // scale - 2), max(0, (box[1] // scale - 2) // across * across)
        bottom = min(height, -(-(box[0] + box[2]) // scale) + 2)
        right = min(width, -(-(box[1] + box[3]) // scale) + 2)
        self._check(library.tj3SetScalingFactor(handle, _Fraction(1, scale)))
        self._check(library.tj3SetCroppingRegion(handle, _Region(left, top, right - left, bottom - top)))
        pixels = np.empty((bottom - top, right - left, 3), np.uint8)
        self._check(library.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, 0, _RGB))
        return Part(pixels, scale, top, left)

    def _check(self, status: int) -> None:
        if status != 0:
            message = self._library.tj3GetErrorStr(self._handle).decode("utf-8", "replace")
            raise JpegError(f"damaged or truncated JPEG ({message.rstrip('.')})")


@cache
def _library() -> ctypes.CDLL | None:
    """Return TurboJPEG 3, with which the extension module of the package `turbojpeg` is linked; None if it is not installed."""
    spec = importlib.util.find_spec("turbojpeg")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        library.tj3Init.restype = ctypes.c_void_p
        library.tj3Destroy.argtypes = [ctypes.c_void_p]
        library.tj3Destroy.restype = None
        library.tj3Set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        library.tj3Get.argtypes = [ctypes.c_void_p, ctypes.c_int]
        library.tj3DecompressHeader.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
        library.tj3SetScalingFactor.argtypes = [ctypes.c_void_p, _Fraction]
        library.tj3SetCroppingRegion.argtypes = [ctypes.c_void_p, _Region]
        library.tj3Decompress8.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int, ctypes.c_int,
        ]  # fmt: skip
        library.tj3GetErrorStr.argtypes = [ctypes.c_void_p]
        library.tj3GetErrorStr.restype = ctypes.c_char_p
    except (OSError, AttributeError):  # the platform has no such library, or it lacks these functions
        return None
    return library


_thread = threading.local()


def _decoder() -> _PartDecoder | None:
    """Return this thread's decompressor; None if TurboJPEG is not installed."""
    try:
        return _thread.decoder
    except AttributeError:
        library = _library()
        _thread.decoder = None if library is None else _PartDecoder(library)
        return _thread.decoder
