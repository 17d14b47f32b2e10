"""A hostile file costs memory in proportion to its size and pixels, and its failure affects no other file."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from refract.augment import ImageError, decode, image_size
from refract.augment.decoding import exif, png, tiff
from refract.augment.decoding.jpeg import JpegError, check_scans

MEGABYTE = 1 << 20


def allocated(call: Callable[[], object]) -> int:
    """Return the peak of the bytes that `call` allocates. `call` may raise ImageError."""
    tracemalloc.start()
    try:
        call()
    except ImageError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak


def tiff_of(entries: list[tuple[int, int, int, int]], rest: bytes = b"") -> bytes:
    """Return a TIFF of one directory. entries: (tag, type, count, value or offset); rest: bytes after the directory."""
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + rest


def test_a_tiff_of_more_strips_than_offsets() -> None:
    fields = {256: 1, 257: 3_000_000, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1}
    data = tiff_of([(tag, 4, 1, value) for tag, value in fields.items()])
    with pytest.raises(ImageError, match=r"it has 1 of 3000000 strips"):
        decode(data)
    assert allocated(lambda: decode(data)) < MEGABYTE


def test_tags_that_share_one_value() -> None:
    pixel = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 4, 1, 8), (259, 4, 1, 1), (262, 4, 1, 1), (273, 4, 1, 8)]
    pixel += [(277, 4, 1, 1), (278, 4, 1, 1), (279, 4, 1, 1)]
    for kind, count in ((1, 100_000), (3, 50_000)):
        shared = [(tag, kind, count, 8 + 2 + 12 * 409 + 4) for tag in range(40_000, 40_400)]
        data = tiff_of(pixel + shared, bytes(100_000))
        with pytest.raises(ImageError, match="its directory cannot be read"):
            image_size(data)
        assert allocated(lambda data=data: image_size(data)) < MEGABYTE
    two = tiff_of([*pixel, (282, 5, 1, 8 + 2 + 12 * 11 + 4), (283, 5, 1, 8 + 2 + 12 * 11 + 4)], bytes(8))
    assert decode(two).tolist() == [[[two[8]] * 3]]


def test_repeated_exif_headers() -> None:
    rotated = b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 3, 1, 6)
    assert [exif.orientation(exif.HEADER * count + rotated) for count in (0, 1, 4)] == [6, 6, 6]
    assert exif.orientation(exif.HEADER * 1_000_000 + rotated) == 1


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_repeated_compressed_chunks_of_a_png() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 6)).save(buffer, "PNG")
    plain, text = buffer.getvalue(), b"XML:com.adobe.xmp\0\1\0\0\0"
    bomb = zlib.compress(bytes(24 * MEGABYTE))
    rotated = chunk(b"iTXt", text + zlib.compress(b'<x tiff:Orientation="6"/>'))
    data = plain[:-12] + rotated + chunk(b"iTXt", text + bomb) * 3 + chunk(b"iCCP", b"x\0\0" + bomb) * 20 + plain[-12:]
    chunks = png.read_chunks(data)
    assert chunks.profile() == b""  # invalid after the pixels
    assert image_size(data) == (4, 6)  # from the first XMP chunk
    assert allocated(lambda: image_size(data)) < 2 * MEGABYTE
    for count in (1, 20):
        data = plain[:33] + chunk(b"iCCP", b"x\0\0" + bomb) * count + plain[33:]
        assert allocated(lambda data=data: decode(data, color_profile="convert")) < 14 * MEGABYTE
    with pytest.raises(ImageError, match="more than 8 colour profiles"):
        image_size(data)


@pytest.mark.parametrize("bits", [1, 6, 12, 24])
def test_packed_bits_are_unpacked_in_blocks(bits: int) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (3, 70_001 * bits // 8 + 1), np.uint8)
    flat = np.unpackbits(stored, axis=1)[:, : 70_001 * bits].reshape(3, 70_001, bits).astype(np.int64)
    values = tiff._unpack_bits(stored, bits, 70_001)
    np.testing.assert_array_equal(values, flat @ (1 << np.arange(bits - 1, -1, -1)))
    large = np.zeros((2000, 1000 * bits // 8), np.uint8)
    assert allocated(lambda: tiff._unpack_bits(large, bits, 1000)) < 2_000_000 * values.itemsize + 4 * MEGABYTE


def encoded(seed: int, **options: object) -> bytes:
    buffer, pixels = io.BytesIO(), np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
def test_scan_markers_outside_the_image_are_not_counted(progressive: bool) -> None:
    plain = encoded(0, progressive=progressive)
    metadata = b"\xff\xe5" + struct.pack(">H", 402) + b"\xff\xda" * 200
    for data in (plain + b"\xff\xda" * 200, plain[:2] + metadata + plain[2:]):
        np.testing.assert_array_equal(decode(data, max_pixels=10_000), decode(plain))


@pytest.mark.parametrize(
    "cover", [b"", b"\xff\x02\xff\xff", b"\xff\x01", b"\xff\xd3", b"\xff\xff\x00", b"\xff\xf2\xff\xff"]
)
def test_scan_markers_after_entropy_coded_data_are_counted(cover: bytes) -> None:
    plain = encoded(0, progressive=True)
    bomb = plain[:-2] + cover + plain[plain.rindex(b"\xff\xda") : -2] * 200 + plain[-2:]
    with pytest.raises(JpegError, match=r"JPEG of 21\d scans"):
        check_scans(bomb)
