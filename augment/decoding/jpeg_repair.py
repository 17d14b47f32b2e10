"""Repair JPEG files with a damaged structure, which browsers show and the strict decoder refuses.

Repairs stray bytes before a marker, a second SOI, and a missing EOI after complete data. Entropy-coded data are never changed: a file
that is cut inside them, or whose bits are wrong, stays refused. Source: ITU-T T.81, annex B.
"""

import re
from itertools import pairwise

from refract.augment.decoding.jpeg import segments

_NEXT = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # a marker that ends entropy-coded data
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
MAX_DECODES = 8
"""Most decoding attempts for one damaged file."""

_SOI, _EOI, _SOS = b"\xff\xd8", b"\xff\xd9", 0xDA


def repair_structure(data: bytes, *, strict: bool = True) -> tuple[bytes, list[str]] | None:
    """Return (the file with valid segments only, the repairs); None if nothing can be repaired. data: starts with SOI.

    strict: whether the decoder refuses truncated data, so that a missing EOI may be added.
    """
    parts, remarks, position, scans = [_SOI], list[str](), 2, 0
    while position < len(data):
        marker = data.find(b"\xff", position)
        while 0 <= marker < len(data) - 1 and data[marker + 1] in (0x00, 0xFF):
            marker = data.find(b"\xff", marker + 1)
        if marker < 0 or marker + 1 >= len(data):
            break
        if data[position:marker].strip(b"\xff"):
            remarks.append("bytes between its markers")
        kind = data[marker + 1]
        if kind == 0xD9:
            parts.append(_EOI)
            break
        if kind == 0x01 or 0xD0 <= kind <= 0xD8:
            if kind == 0xD8:
                remarks.append("a second start marker")
            position = marker + 2
            continue
        length = int.from_bytes(data[marker + 2 : marker + 4])
        if length < 2 or marker + 2 + length > len(data):
            return None
        end = marker + 2 + length
        if kind == _SOS:
            scans += 1
            match = _NEXT.search(data, end)
            end = match.start() if match else len(data)
        parts.append(data[marker:end])
        position = end
    if parts[-1] != _EOI:
        if not strict or scans != 1 or _progressive(parts):  # a later scan may be missing too
            return None
        remarks.append("no end marker")
        parts.append(_EOI)
    return (b"".join(parts), list(dict.fromkeys(remarks))) if remarks else None


def reports_extraneous(message: str) -> bool:
    """Whether libjpeg-turbo's message counts bytes after complete entropy-coded data."""
    match = _EXTRANEOUS.search(message)
    return (
        match is not None and not 0xD0 <= int(match[2], 16) <= 0xD7
    )  # before a restart marker, the data themselves are damaged


def extraneous_spans(data: bytes, message: str) -> list[tuple[int, int]]:
    """Return the candidate spans (start, end), in file order, of the extraneous bytes that the message counts.

    The bytes lie after a scan's entropy-coded data and before the marker that the message names.
    """
    match = _EXTRANEOUS.search(message)
    if match is None or not reports_extraneous(message):
        return []
    count, code = int(match[1]), int(match[2], 16)
    pairs = pairwise(segments(data))
    gaps = ((scan[2], marker[1]) for scan, marker in pairs if scan[0] == _SOS and marker[0] == code)
    return [(end - count, end) for start, end in gaps if end - count > start]


def _progressive(parts: list[bytes]) -> bool:
    """Whether more scans may follow the first: a progressive frame, or a scan of some components."""
    frame = next((part for part in parts if part[1:2] in (b"\xc0", b"\xc1", b"\xc2", b"\xc3")), b"")
    scan = next((part for part in parts if part[1:2] == b"\xda"), b"")
    return frame[1:2] not in (b"\xc0", b"\xc1") or len(frame) < 10 or len(scan) < 5 or frame[9] != scan[4]
