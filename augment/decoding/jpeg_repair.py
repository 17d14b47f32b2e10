"""JPEG files that browsers show although their structure is damaged: the same file without the damage, for the strict decoder.

What is mended: bytes that belong to nothing in front of a marker, a second SOI, and a missing EOI behind complete data. Entropy-coded data
are never touched: a file that is cut inside them, or whose bits are wrong, stays refused. Source: ITU-T T.81, annex B.
"""

import re
from itertools import pairwise

from refract.augment.decoding.jpeg import segments

_NEXT = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # a marker that ends entropy-coded data
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
TRIES = 8
"""Decodes of one damaged file, at most."""

_SOI, _EOI, _SOS = b"\xff\xd8", b"\xff\xd9", 0xDA


def tidied(data: bytes, *, strict: bool = True) -> tuple[bytes, list[str]] | None:
    """(the file with its segments alone, what was mended); None where nothing could be. data: starts with SOI.

    strict: whether the decoder refuses data that are cut, so that a missing EOI can be added.
    """
    parts, remarks, place, scans = [_SOI], list[str](), 2, 0
    while place < len(data):
        marker = data.find(b"\xff", place)
        while 0 <= marker < len(data) - 1 and data[marker + 1] in (0x00, 0xFF):
            marker = data.find(b"\xff", marker + 1)
        if marker < 0 or marker + 1 >= len(data):
            break
        if data[place:marker].strip(b"\xff"):
            remarks.append("bytes between its markers")
        kind = data[marker + 1]
        if kind == 0xD9:
            parts.append(_EOI)
            break
        if kind == 0x01 or 0xD0 <= kind <= 0xD8:
            if kind == 0xD8:
                remarks.append("a second start marker")
            place = marker + 2
            continue
        length = int.from_bytes(data[marker + 2 : marker + 4])
        if length < 2 or marker + 2 + length > len(data):
            return None
        end = marker + 2 + length
        if kind == _SOS:
            scans += 1
            found = _NEXT.search(data, end)
            end = found.start() if found else len(data)
        parts.append(data[marker:end])
        place = end
    if parts[-1] != _EOI:
        if not strict or scans != 1 or _progressive(parts):  # a later scan may be missing as well
            return None
        remarks.append("no end marker")
        parts.append(_EOI)
    return (b"".join(parts), list(dict.fromkeys(remarks))) if remarks else None


def reports_extraneous(message: str) -> bool:
    """Return whether libjpeg-turbo's message counts bytes behind complete entropy-coded data."""
    match = _EXTRANEOUS.search(message)
    return match is not None and not 0xD0 <= int(match[2], 16) <= 0xD7  # before a restart marker the data are damaged


def extraneous(data: bytes, message: str) -> list[tuple[int, int]]:
    """Return (start, end) of every place, in file order, where the bytes that the message counts may be.

    They stand in front of the marker that the message names, behind the entropy-coded data of a scan.
    """
    match = _EXTRANEOUS.search(message)
    if match is None or not reports_extraneous(message):
        return []
    count, code = int(match[1]), int(match[2], 16)
    pairs = pairwise(segments(data))
    places = ((scan[2], marker[1]) for scan, marker in pairs if scan[0] == _SOS and marker[0] == code)
    return [(end - count, end) for start, end in places if end - count > start]


def _progressive(parts: list[bytes]) -> bool:
    """Whether one scan may not be all: a progressive frame, or a scan of some components."""
    frame = next((part for part in parts if part[1:2] in (b"\xc0", b"\xc1", b"\xc2", b"\xc3")), b"")
    scan = next((part for part in parts if part[1:2] == b"\xda"), b"")
    return frame[1:2] not in (b"\xc0", b"\xc1") or len(frame) < 10 or len(scan) < 5 or frame[9] != scan[4]
