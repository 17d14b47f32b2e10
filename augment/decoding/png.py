"""Read the chunks of a PNG that decide how its pixels are displayed. Source: PNG, third edition (W3C 2025), 5 and 11."""

import zlib
from typing import NamedTuple

from refract.augment.decoding.errors import ImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_XMP = b"XML:com.adobe.xmp\x00"
_MAX_BYTES = 1 << 22  # of the decompressed profile, and of the decompressed XMP data
_MAX_PROFILES = 8  # the standard allows one; Pillow decompresses each


class Chunks(NamedTuple):
    """The chunks of one PNG.

    size: (height, width) as stored. depth: bits per sample. exif: a TIFF structure. transparent: whether a tRNS chunk exists.
    text, packed: the bodies of the first XMP chunk and the first iCCP chunk, which the methods decompress.
    """

    size: tuple[int, int]
    depth: int = 8
    exif: bytes = b""
    text: bytes = b""
    packed: bytes = b""
    transparent: bool = False

    def xmp(self) -> bytes:
        """Return the XMP data; empty if they are missing or damaged."""
        text = self.text[len(_XMP) + 2 :].split(b"\x00", 2)[-1]
        return _inflate(text) if self.text[len(_XMP) : len(_XMP) + 1] == b"\x01" else text

    def profile(self) -> bytes:
        """Return the ICC profile; empty if it is missing or damaged."""
        return _inflate(self.packed.partition(b"\x00")[2][1:])


def read_chunks(data: bytes) -> Chunks:
    """Read the chunks before and after the pixels, up to the end of the bytes. ImageError if the header is missing."""
    if data[12:16] != b"IHDR" or len(data) < 26:
        raise ImageError("damaged PNG: its header cannot be read; save the image again, as JPEG")
    size, depth = (int.from_bytes(data[20:24]), int.from_bytes(data[16:20])), data[24]
    exif = text = packed = b""
    transparent, start, end, profiles = False, 8, len(data) - 8, 0
    pixels_reached = False
    while start <= end:
        length, kind = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        if kind == b"IDAT":
            pixels_reached = True
        else:
            if kind == b"IEND":
                break
            body = slice(start + 8, start + 8 + length)
            if kind == b"eXIf" and not exif:
                exif = data[body]
            elif kind == b"iTXt" and not text and data.startswith(_XMP, body.start):
                text = data[body]
            elif kind == b"iCCP" and not pixels_reached:  # invalid after the pixels
                profiles += 1
                if profiles > _MAX_PROFILES:
                    raise ImageError(f"damaged PNG: it has more than {_MAX_PROFILES} colour profiles")
                packed = packed or data[body]
            elif kind == b"tRNS":
                transparent = True
        start += 12 + length
    return Chunks(size, depth, exif, text, packed, transparent)


def _inflate(packed: bytes) -> bytes:
    """Decompress; empty for damaged data, since the pixels are valid without them."""
    if not packed:
        return b""
    try:
        return zlib.decompressobj().decompress(packed, _MAX_BYTES)
    except zlib.error:
        return b""
