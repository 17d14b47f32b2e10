"""Damaged and hostile files: cut, flipped, spliced, bombs, polyglots."""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin

from benchmarks.corpus.case import Case, encoded, part, random_image, saved


def cases(rng: np.random.Generator) -> Iterator[Case]:
    for make in (_truncated, _flipped, _spliced, _garbage, _announced, _bombs, _polyglots):
        yield from make(rng)


def _files(rng: np.random.Generator) -> dict[str, bytes]:
    pixels = random_image(rng)
    return {
        "jpeg": encoded(pixels, "JPEG", quality=90),
        "progressive": encoded(pixels, "JPEG", progressive=True),
        "png": encoded(pixels, "PNG"),
        "webp": encoded(pixels, "WEBP"),
        "gif": encoded(pixels, "GIF"),
        "tiff": encoded(pixels, "TIFF", compression="tiff_lzw"),
        "bmp": encoded(pixels, "BMP"),
    }


def _truncated(rng: np.random.Generator) -> Iterator[Case]:
    for form, data in _files(rng).items():
        for cut in sorted({int(c) for c in np.geomspace(1, len(data) - 1, 40)}):
            yield Case(f"{form} cut at {cut}", data[:cut])


def _flipped(rng: np.random.Generator) -> Iterator[Case]:
    for form, data in _files(rng).items():
        for k in range(120):
            damaged = bytearray(data)
            # Half of them in the header, where the sizes and tables stand.
            end = len(data) if k % 2 else min(len(data), 300)
            for place in rng.integers(0, end, 1 + k % 8):
                damaged[place] ^= 1 << int(rng.integers(8))
            yield Case(f"{form} with flipped bits {k}", bytes(damaged))


def _spliced(rng: np.random.Generator) -> Iterator[Case]:
    files = list(_files(rng).items())
    for k in range(210):
        (form, data), (other, more) = files[k % len(files)], files[int(rng.integers(len(files)))]
        place = int(rng.integers(len(data)))
        match k % 3:
            case 0:
                splice = data[:place] + more + data[place:]
            case 1:
                splice = data[:place] + rng.bytes(int(rng.integers(1, 64))) + data[place + 8 :]
            case _:
                splice = data[:place] + more[int(rng.integers(len(more))) :]
        yield Case(f"{form} spliced with {other} {k}", splice)


def _garbage(rng: np.random.Generator) -> Iterator[Case]:
    for k in range(120):
        yield Case(f"noise {k}", rng.bytes(int(rng.integers(1, 5_000))), statuses=(400,))
    for length in (1, 7, 100, 100_000):
        yield Case(f"{length} zero bytes", bytes(length), statuses=(400,))
    yield Case("nothing", b"", statuses=(400,))
    for magic in (
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\0\0\0\0WEBP",
        b"II*\0",
        b"MM\0*",
        b"BM",
        b"\0\0\0\x0cftypavif",
    ):
        for length in (0, 1, 12, 300):
            yield Case(f"{magic!r} and {length} bytes", magic + rng.bytes(length))


def _announced(rng: np.random.Generator) -> Iterator[Case]:
    """Headers that announce far more pixels than follow."""
    files = _files(rng)
    for width, height in (
        (65_535, 65_535),
        (50_000, 50_000),
        (1, 65_535),
        (65_535, 1),
        (0, 0),
        (0, 5),
        (2**31 - 1, 2**31 - 1),
    ):
        jpeg = bytearray(files["jpeg"])
        frame = jpeg.index(b"\xff\xc0") + 5
        jpeg[frame : frame + 4] = struct.pack(">HH", min(height, 65_535), min(width, 65_535))
        png = bytearray(files["png"])
        png[16:24] = struct.pack(">II", width, height)
        png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
        gif = bytearray(files["gif"])
        gif[6:10] = struct.pack("<HH", min(width, 65_535), min(height, 65_535))
        bmp = bytearray(files["bmp"])
        bmp[18:26] = struct.pack("<ii", width, height)
        for form, data in (("jpeg", jpeg), ("png", png), ("gif", gif), ("bmp", bmp)):
            yield Case(f"{form} that announces {width} × {height}", bytes(data))


def _bombs(rng: np.random.Generator) -> Iterator[Case]:
    for side in (20_000, 30_000, 60_000):
        yield Case(f"png bomb of {side}²", _flat_png(side, side), statuses=(413,))
    yield Case("a line of 10,000,000 × 4", _flat_png(10_000_000, 4))
    yield Case("a column of 4 × 10,000,000", _flat_png(4, 10_000_000))
    frames = [Image.new("P", (8, 8), k % 256) for k in range(400)]
    yield Case("gif of 400 frames", saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    data = encoded(random_image(rng), "JPEG", progressive=True)
    scan = data[data.index(b"\xff\xda") : data.rindex(b"\xff\xd9")]
    for count in (10, 100, 1_000):
        yield Case(f"jpeg of {count} times its scans", data[:-2] + scan * count + b"\xff\xd9")
    yield Case("jpeg with 3 MB of comments", data[:2] + (b"\xff\xfe\xff\xff" + bytes(65_533)) * 48 + data[2:])
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 5_000_000, zip=True)
    yield Case("png with an inflating text", encoded(random_image(rng), "PNG", pnginfo=text))
    yield Case("png whose icc profile inflates", _with_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(30_000_000), 9)))
    for count in (65, 500):
        form = b"".join(part(f"f{i}", b"x") for i in range(count)) + b"--b--\r\n"
        yield Case(f"form of {count} files", form, "multipart/form-data; boundary=b", statuses=(413,))
    yield Case("body of 25 MB", bytes(25 * 2**20), statuses=(413,))


def _flat_png(width: int, height: int) -> bytes:
    """One bit a pixel, all 0: a few kilobytes."""
    row = bytes(1 + (width + 7) // 8)
    packer = zlib.compressobj(9)
    packed = (
        b"".join(packer.compress(row) for _ in range(height)) if height * len(row) < 10**8 else packer.compress(row * 8)
    )
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", packed + packer.flush()),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _with_chunk(kind: bytes, data: bytes) -> bytes:
    png = encoded(np.full((20, 20, 3), 90, np.uint8), "PNG")
    return png[:33] + _chunk(kind, data) + png[33:]


def _polyglots(rng: np.random.Generator) -> Iterator[Case]:
    files = _files(rng)
    tails = {
        "zip": b"PK\x03\x04" + rng.bytes(200),
        "html": b"<script>alert(1)</script>" * 20,
        "pdf": b"%PDF-1.7\n" + rng.bytes(100),
        "elf": b"\x7fELF" + rng.bytes(400),
    }
    for form, data in files.items():
        for other, tail in tails.items():
            yield Case(f"{form} before {other}", data + tail)
            yield Case(f"{other} before {form}", tail + data)
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:1/x"/></svg>'
    for name, data in {
        "svg": svg,
        "xml bomb": b'<!DOCTYPE a [<!ENTITY b "bbb">]><a>&b;</a>',
        "python": b"import os",
        "pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR.",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "url": b"http://127.0.0.1:1/x.jpg",
    }.items():
        yield Case(name, data, statuses=(400,))
