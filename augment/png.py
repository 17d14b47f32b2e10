"""PNG: the chunks that decide how its pixels are shown, wherever they are. Source: PNG, third edition (W3C 2025), 5 and 11."""

import zlib
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_XMP = b"XML:com.adobe.xmp\x00"
_LARGEST = 1 << 24  # bytes of metadata that are decompressed


class Chunks(NamedTuple):
    """size: (height, width) as stored. depth: bits a sample. exif: a TIFF structure. transparent: whether there is a tRNS chunk."""

    size: tuple[int, int]
    depth: int = 8
    exif: bytes = b""
    xmp: bytes = b""
    profile: bytes = b""
    transparent: bool = False


def read_chunks(data: bytes) -> Chunks:
    """The chunks in front of the pixels and behind them, as far as the bytes reach. ValueError where the header is missing."""
    if data[12:16] != b"IHDR" or len(data) < 26:
        raise ValueError("no IHDR chunk")
    size, depth = (int.from_bytes(data[20:24]), int.from_bytes(data[16:20])), data[24]
    exif = xmp = profile = b""
    transparent, place, end = False, 8, len(data) - 8
    while place <= end:
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        if kind != b"IDAT":
            if kind == b"IEND":
                break
            body = slice(place + 8, place + 8 + length)
            if kind == b"eXIf" and not exif:
                exif = data[body]
            elif kind == b"iTXt" and data.startswith(_XMP, body.start):
                xmp = _international_text(data[body])
            elif kind == b"iCCP":
                profile = _inflated(data[body].partition(b"\x00")[2][1:])
            elif kind == b"tRNS":
                transparent = True
        place += 12 + length
    return Chunks(size, depth, exif, xmp, profile, transparent)


def _international_text(body: bytes) -> bytes:
    rest = body[len(_XMP) :]
    text = rest[2:].split(b"\x00", 2)[-1]
    return _inflated(text) if rest[:1] == b"\x01" else text


def _inflated(packed: bytes) -> bytes:
    """Empty where the data are damaged: the pixels are good without them."""
    try:
        return zlib.decompressobj().decompress(packed, _LARGEST)
    except zlib.error:
        return b""
