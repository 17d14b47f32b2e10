"""JPEG: what its header says, and decoding just the part that is needed, by libjpeg-turbo.

A part is decoded through the TurboJPEG 3 library that the package `turbojpeg` carries, with its cropping region: rows below the part are
not read, rows above and columns beside it are only run through the entropy decoder. Where that package has no wheel for the machine,
`simplejpeg` decodes the whole image, to the same pixels. Nothing here knows EXIF orientations: see `refract.augment.decoding.decode`.
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
"""By how much a side may be reduced in decoding: those for which libjpeg-turbo has SIMD code."""

SMALLEST_REDUCED = 16
"""Pixels of the shorter side below which an image is not reduced: simplejpeg is asked for a size, which there fits several scales."""


MOST_SCANS = 100
"""Scans of a JPEG that is decoded: encoders make about ten, and each of a bomb's thousands costs a pass over all pixels."""


class JpegError(ValueError):
    """The bytes are no JPEG that libjpeg-turbo decodes; the message says why."""


class JpegHeader(NamedTuple):
    """height, width: pixels as stored. components: 1 grey, 3 colour, 4 CMYK. baseline: one scan, in order, is the rule.

    exif, xmp, profile: (start, end) of the data of these segments; a profile may have several. precision: bits a sample.
    """

    height: int
    width: int
    components: int
    baseline: bool
    exif: tuple[int, int] | None = None
    xmp: tuple[int, int] | None = None
    profile: tuple[tuple[int, int], ...] = ()
    precision: int = 8


class Part(NamedTuple):
    """A decoded part of an image. pixels: uint8 H×W×3.

    scale: 1, 2, 4 or 8, by which both sides were reduced. top, left: where the part begins in the reduced image, in its pixels.
    remarks: what the owner of the file should know, such as what was repaired.
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


def read_header(data: bytes) -> JpegHeader:
    """Read the markers up to the frame's. JpegError where they end before it or make no sense. (ITU-T T.81, annex B.)

    Bytes between segments that belong to none are skipped, as libjpeg does.
    """
    place, end = 2, len(data)
    exif = xmp = None
    profile: list[tuple[int, int]] = []
    while place + 4 <= end:
        if data[place] != 0xFF:
            place = data.find(b"\xff", place)
            if place < 0:
                break
            continue
        marker = data[place + 1]
        if marker == 0xFF:  # any number of these may fill the space before a marker
            place += 1
            continue
        if marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment, and a byte that belongs to none
            place += 2
            continue
        length = data[place + 2] << 8 | data[place + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = data[place + 4 : place + 10]
            if len(frame) < 6 or length < 8:
                break
            height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
            if not height or not width:
                raise JpegError("damaged or truncated JPEG header (a side of 0 pixels)")
            baseline = marker in (0xC0, 0xC1)
            return JpegHeader(height, width, frame[5], baseline, exif, xmp, tuple(profile), frame[0])
        if marker in (0xD9, 0xDA) or length < 2:  # the image's end or its data, and no frame before
            break
        body = place + 4
        if marker == 0xE1 and exif is None and data.startswith(_EXIF, body):
            exif = (body, place + 2 + length)
        elif marker == 0xE1 and xmp is None and data.startswith(_XMP, body):
            xmp = (body + len(_XMP), place + 2 + length)
        elif marker == 0xE2 and data.startswith(_PROFILE, body):
            profile.append((body + len(_PROFILE), place + 2 + length))
        place += 2 + length
    raise JpegError("damaged or truncated JPEG header (no frame found)")


def orientation(data: bytes, header: JpegHeader) -> int:
    """The orientation, 1…8, by EXIF or else XMP; 1 where there is none or it cannot be read."""
    if header.exif is None and header.xmp is None:
        return 1
    exif, xmp = (b"" if at is None else data[at[0] : at[1]] for at in (header.exif, header.xmp))
    return exif_orientation(exif, xmp)


def profile_of(data: bytes, header: JpegHeader) -> bytes:
    """The embedded ICC profile, empty where there is none or a part of it is missing. (ICC.1:2022, B.4.)"""
    parts = sorted(
        (data[start], data[start + 2 : end]) for start, end in header.profile if start + 2 <= min(end, len(data))
    )
    counts = {data[start + 1] for start, end in header.profile if start + 2 <= min(end, len(data))}
    if [number for number, _ in parts] != list(range(1, len(parts) + 1)) or counts != {len(parts)}:
        return b""
    return b"".join(part for _, part in parts)


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (code, start, end) of each segment up to the end marker, whose end is the last; data: starts with SOI.

    start: of the marker. end: behind the segment, and in front of the entropy-coded data that follow SOS. (ITU-T T.81, annex B.)
    """
    place = 2
    while found := _MARKER.search(data, place):
        start, code = found.start(), data[found.start() + 1]
        if code == 0xD9:
            yield code, start, start + 2
            return
        place = start + 2
        if code in _WITH_SEGMENT:  # not behind another code, whose length libjpeg does not skip
            place += max(2, int.from_bytes(data[place : place + 2]))
            yield code, start, place


def check_scans(data: bytes) -> None:
    """JpegError for a JPEG of more than `MOST_SCANS` scans, counted by their markers, before libjpeg works through them."""
    if data.count(b"\xff\xda") <= MOST_SCANS:
        return
    scans = sum(code == 0xDA for code, _, _ in segments(data))  # not those in metadata, nor behind the image
    if scans > MOST_SCANS:
        raise JpegError(f"a JPEG of {scans:,} scans; at most {MOST_SCANS} are decoded")


def decode_whole(data: bytes, header: JpegHeader, scale: int = 1) -> np.ndarray:
    """All pixels, uint8 H×W×3, each side reduced by `scale` and rounded up. JpegError for damaged or truncated data.

    scale: of `SCALES`; 1 for a side below `SMALLEST_REDUCED`.
    """
    options = {}
    if scale > 1:
        options = {"min_height": -(-header.height // scale), "min_width": -(-header.width // scale), "min_factor": 2}
    try:
        return simplejpeg.decode_jpeg(data, "RGB", **options)
    except (ValueError, OverflowError, SystemError) as error:
        raise JpegError(f"damaged or truncated JPEG ({str(error).rstrip('.')})") from error


def decode_part(data: bytes, header: JpegHeader, box: tuple[int, int, int, int], scale: int = 1) -> Part:
    """At least the pixels of `box`, the same as `decode_whole` gives.

    box: (top, left, height, width) in pixels of the image as stored, inside it. Damage below the box is not noticed.
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


# From turbojpeg.h, version 3: parameters of an instance, pixel formats, error classes, and a block's sides for each chroma subsampling.
_STOP_ON_WARNING, _SUBSAMPLING, _WIDTH, _HEIGHT = 0, 4, 5, 6
_RGB = 0
_BLOCK = {0: (8, 8), 1: (8, 16), 2: (16, 16), 3: (8, 8), 4: (16, 8), 5: (8, 32), 6: (32, 8)}  # (height, width)


class _PartDecoder:
    """One TurboJPEG decompressor; not to be shared between threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._handle = library.tj3Init(1)
        if not self._handle:
            raise MemoryError("TurboJPEG could not make a decompressor")
        library.tj3Set(self._handle, _STOP_ON_WARNING, 1)

    def __del__(self) -> None:
        self._library.tj3Destroy(self._handle)

    def decode(self, data: bytes, box: tuple[int, int, int, int], scale: int) -> Part | None:
        """None for a chroma subsampling whose blocks TurboJPEG does not tell."""
        library, handle = self._library, self._handle
        self._check(library.tj3DecompressHeader(handle, data, len(data)))
        block = _BLOCK.get(library.tj3Get(handle, _SUBSAMPLING))
        if block is None:
            return None
        height, width = (-(-library.tj3Get(handle, side) // scale) for side in (_HEIGHT, _WIDTH))
        across = -(-block[1] // scale)
        # Two pixels more on every side: halved chroma is interpolated from its neighbours, which at the region's edge are not there.
        # The region begins at a block's edge; its other three sides are free.
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
    """TurboJPEG 3, which the extension module of the package `turbojpeg` is linked with; None where it is not installed."""
    found = importlib.util.find_spec("turbojpeg")
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
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
    except (OSError, AttributeError):  # no such library on this platform, or one without these functions
        return None
    return library


_thread = threading.local()


def _decoder() -> _PartDecoder | None:
    """This thread's decompressor."""
    try:
        return _thread.decoder
    except AttributeError:
        library = _library()
        _thread.decoder = None if library is None else _PartDecoder(library)
        return _thread.decoder
