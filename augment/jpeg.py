"""JPEG: what its header says, and decoding just the part that is needed, by libjpeg-turbo.

A part is decoded through the TurboJPEG 3 library that the package `turbojpeg` carries, with its cropping region: rows below the part are
not read, rows above and columns beside it are only run through the entropy decoder. Where that package has no wheel for the machine,
`simplejpeg` decodes the whole picture, to the same pixels. Nothing here knows EXIF orientations: see `augment.decode`.
"""

import ctypes
import importlib.util
import struct
import threading
from dataclasses import dataclass
from functools import cache

import numpy as np
import simplejpeg

SCALES = (1, 2, 4, 8)
"""By how much a side may be reduced in decoding: those for which libjpeg-turbo has SIMD code."""

SMALLEST_REDUCED = 16
"""Pixels of the shorter side below which a picture is not reduced: simplejpeg is asked for a size, which there fits several scales."""


MOST_SCANS = 100
"""Scans of a JPEG that is decoded: encoders make about ten, and each of a bomb's thousands costs a pass over all pixels."""


class JpegError(ValueError):
    """The bytes are no JPEG that libjpeg-turbo decodes; the message says why."""


@dataclass(frozen=True)
class JpegHeader:
    """height, width: pixels as stored. components: 1 grey, 3 colour, 4 CMYK. exif: where `Exif` data start, −1 for none. baseline: one
    scan, in order, is the rule."""

    height: int
    width: int
    components: int
    exif: int
    baseline: bool


@dataclass(frozen=True)
class Part:
    """A decoded part of a picture. pixels: uint8 H×W×3.

    scale: 1, 2, 4 or 8, by which both sides were reduced. top, left: where the part begins in the reduced picture, in its pixels.
    """

    pixels: np.ndarray
    scale: int = 1
    top: float = 0
    left: float = 0


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def read_header(data: bytes) -> JpegHeader:
    """Read the markers up to the frame's. JpegError where they end before it or make no sense. (ITU-T T.81, annex B.)"""
    place, exif, end = 2, -1, len(data)
    while place + 4 <= end and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # any number of these may fill the space before a marker
            place += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment
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
            return JpegHeader(height, width, frame[5], exif, marker in (0xC0, 0xC1))
        if marker in (0xD9, 0xDA) or length < 2:  # the picture's end or its data, and no frame before
            break
        if marker == 0xE1 and exif < 0 and data[place + 4 : place + 10] == b"Exif\x00\x00":
            exif = place + 4
        place += 2 + length
    raise JpegError("damaged or truncated JPEG header (no frame found)")


def orientation(data: bytes, header: JpegHeader) -> int:
    """The EXIF orientation, 1…8; 1 where there is none or it cannot be read. (Exif 2.32, 4.6.4; the TIFF structure of 4.5.)

    Pillow's parser, which knows all of EXIF, takes 20 times as long, and every photo of a phone has EXIF.
    """
    if header.exif < 0:
        return 1
    length = int.from_bytes(data[header.exif - 2 : header.exif])
    tiff = data[header.exif + 6 : header.exif - 2 + length]
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (place,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, place)
        for entry in range(place + 2, place + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == 0x0112:
                form = {1: "B", 3: "H", 4: "I"}.get(kind)  # SHORT by the standard, but some write another
                value = struct.unpack_from(order + form, tiff, entry + 8)[0] if form else 1
                return value if 1 <= value <= 8 else 1
    except struct.error:  # it points beyond the data: the pixels are good without it
        pass
    return 1


def check_scans(data: bytes) -> None:
    """JpegError for a JPEG of more than `MOST_SCANS` scans, counted by their markers, before libjpeg works through them."""
    scans = data.count(b"\xff\xda")
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
    except ValueError as error:
        raise JpegError(f"damaged or truncated JPEG ({str(error).rstrip('.')})") from error


def decode_part(data: bytes, header: JpegHeader, box: tuple[int, int, int, int], scale: int = 1) -> Part:
    """At least the pixels of `box`, the same as `decode_whole` gives.

    box: (top, left, height, width) in pixels of the picture as stored, inside it. Damage below the box is not noticed.
    """
    decoder = _decoder()
    part = decoder.decode(data, box, scale) if decoder is not None else None
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
