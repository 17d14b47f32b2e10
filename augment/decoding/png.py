"""PNG: the chunks that decide how its pixels are shown, wherever they are. Source: PNG, third edition (W3C 2025), 5 and 11."""

import zlib
from typing import NamedTuple

from refract.augment.decoding.errors import ImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_XMP = b"XML:com.adobe.xmp\x00"
_LARGEST = 1 << 22  # bytes to which the profile and the XMP data are each decompressed
_MOST_PROFILES = 8  # one by the standard; Pillow decompresses each


class Chunks(NamedTuple):
    """size: (height, width) as stored. depth: bits a sample. exif: a TIFF structure. transparent: whether there is a tRNS chunk.

    text, packed: the bodies of the first XMP and iCCP chunk, which the methods decompress.
    """

    size: tuple[int, int]
    depth: int = 8
    exif: bytes = b""
    text: bytes = b""
    packed: bytes = b""
    transparent: bool = False

    def xmp(self) -> bytes:
        """Return the XMP data, empty where there are none or they are damaged."""
        text = self.text[len(_XMP) + 2 :].split(b"\x00", 2)[-1]
        return _inflated(text) if self.text[len(_XMP) : len(_XMP) + 1] == b"\x01" else text

    def profile(self) -> bytes:
        """Return the ICC profile, empty where there is none or it is damaged."""
        return _inflated(self.packed.partition(b"\x00")[2][1:])


def read_chunks(data: bytes) -> Chunks:
    """The chunks in front of the pixels and behind them, as far as the bytes reach. ImageError where the header is missing."""
    if data[12:16] != b"IHDR" or len(data) < 26:
        raise ImageError("damaged PNG: its header cannot be read; save the image again, as JPEG")
    size, depth = (int.from_bytes(data[20:24]), int.from_bytes(data[16:20])), data[24]
    exif = text = packed = b""
    transparent, place, end, profiles = False, 8, len(data) - 8, 0
    pixels_reached = False
    while place <= end:
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        if kind == b"IDAT":
            pixels_reached = True
        else:
            if kind == b"IEND":
                break
            body = slice(place + 8, place + 8 + length)
            if kind == b"eXIf" and not exif:
                exif = data[body]
            elif kind == b"iTXt" and not text and data.startswith(_XMP, body.start):
                text = data[body]
            elif kind == b"iCCP" and not pixels_reached:  # behind the pixels it is not valid
                profiles += 1
                if profiles > _MOST_PROFILES:
                    raise ImageError(f"damaged PNG: it has more than {_MOST_PROFILES} colour profiles")
                packed = packed or data[body]
            elif kind == b"tRNS":
                transparent = True
        place += 12 + length
    return Chunks(size, depth, exif, text, packed, transparent)


def _inflated(packed: bytes) -> bytes:
    """Empty where the data are damaged: the pixels are good without them."""
    if not packed:
        return b""
    try:
        return zlib.decompressobj().decompress(packed, _LARGEST)
    except zlib.error:
        return b""
