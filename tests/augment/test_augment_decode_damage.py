"""Decoding any bytes returns pixels or raises ImageError; JPEG files with a damaged structure are repaired."""

import io
import random
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

from refract.augment import ImageError, decode, image_size
from refract.augment.decoding.decode import decode_part, from_pillow

MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "I;16",
    "I;16B",
    "F",
)
OPTIONS = {
    "TIFF": (
        {},
        {"compression": "tiff_lzw"},
        {"compression": "jpeg"},
        {"compression": "group4"},
        {"compression": "zstd"},
    )
}


def image_of_mode(mode: str) -> Image.Image:
    size = (23, 17)
    grey = Image.fromarray(np.linspace(0, 255, 23 * 17).astype(np.uint8).reshape(17, 23))
    if mode in ("La", "RGBa", "LAB", "HSV", "PA", "RGBX", "I;16", "I;16B"):
        try:
            return {"La": grey.convert("LA"), "RGBa": grey.convert("RGBA")}.get(mode, grey.convert("RGB")).convert(mode)
        except ValueError:
            return Image.new(mode, size, 0 if mode.startswith("I") else None)
    return grey.convert(mode)


def corpus() -> list[tuple[str, bytes]]:
    """Return (name, bytes) of a file in each format and mode that the installed Pillow writes."""
    Image.init()
    files = []
    for kind in sorted(set(Image.SAVE) - {"PDF", "HDF5", "GRIB", "BUFR", "WMF"}):
        for mode in MODES:
            for options in OPTIONS.get(kind, ({},)):
                buffer = io.BytesIO()
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        image_of_mode(mode).save(buffer, kind, **options)
                except Exception:  # the format does not support the mode
                    continue
                files.append((f"{kind} {mode} {options.get('compression', '')}", buffer.getvalue()))
    return files


CORPUS = corpus()
READ = ("JPEG ", "PNG ", "WEBP ", "BMP ", "GIF ", "TIFF ", "AVIF ", "MPO ")


def decode_or_none(data: bytes) -> np.ndarray | None:
    """Return the pixels, or None for an ImageError; any other error fails the test."""
    try:
        pixels = decode(data)
    except ImageError:
        return None
    assert pixels.dtype == np.uint8 and pixels.shape == (*image_size(data), 3)
    return pixels


@pytest.mark.parametrize("kind", sorted({name.split()[0] for name, _ in CORPUS}))
def test_every_mode_of_every_format_and_its_damage(kind: str) -> None:
    chance = random.Random(kind)
    decoded = 0
    for name, data in CORPUS:
        if name.split()[0] != kind:
            continue
        decoded += decode_or_none(data) is not None
        for _ in range(12):
            broken = bytearray(data)
            for _ in range(chance.randint(1, 4)):
                # Most flips hit the header, where the parsers are.
                broken[chance.randrange(min(len(data), chance.choice((40, 300, len(data)))))] = chance.randrange(256)
            decode_or_none(bytes(broken))
            decode_or_none(data[: chance.randrange(len(data))])
    assert decoded or kind + " " not in READ


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_a_pillow_image(mode: str) -> None:
    try:
        pixels = from_pillow(image_of_mode(mode))
    except ImageError as error:
        assert mode in ("F", "LAB") and "save the image as" in str(error)
        return
    assert pixels.shape == (17, 23, 3) and pixels.dtype == np.uint8


def test_pixels_beyond_sixteen_bits_of_a_pillow_image() -> None:
    values = np.array([[0, 257 * 100, 65535]], np.int32)
    assert from_pillow(Image.fromarray(values))[0, :, 0].tolist() == [0, 100, 255]
    with pytest.raises(ImageError, match="32-bit pixels of -5 to 65535 have no known range"):
        from_pillow(Image.fromarray(values - np.array([[5, 0, 0]], np.int32)))


def test_premultiplied_grey_tiff() -> None:
    """Pillow opens the file in the mode La, which it cannot convert to RGB."""
    width, height = 8, 6
    data = bytes(v for _ in range(height) for x in range(width) for v in (16 * x, 128 + 16 * (x // 2)))
    fields = [
        (256, width),
        (257, height),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 0),
        (277, 2),
        (278, height),
        (279, len(data)),
        (338, 1),
    ]
    start = 8 + 2 + 12 * len(fields) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in fields)
    tiff = b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + struct.pack("<I", 0) + data
    expected = [min(255, 16 * x + 255 - (128 + 16 * (x // 2))) for x in range(width)]
    np.testing.assert_allclose(decode(tiff)[0, :, 0], expected, atol=1)


def photo(height: int = 60, width: int = 90) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 2, y * 3, (x + y) % 256], axis=-1).astype(np.uint8))


def jpeg(image: Image.Image | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or photo()).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def between(data: bytes, marker: bytes, junk: bytes) -> bytes:
    start = data.index(marker)
    return data[:start] + junk + data[start:]


def between_scans(data: bytes, marker: bytes, number: int, junk: bytes) -> bytes:
    """Insert junk before the marker with this index."""
    parts = data.split(marker)
    number %= len(parts) - 1
    return marker.join(parts[: number + 1]) + junk + marker + marker.join(parts[number + 1 :])


PLAIN = jpeg()
PROGRESSIVE = jpeg(progressive=True)
THUMBNAIL = b"Exif\0\0" + jpeg(photo(16, 16))
WITH_THUMBNAIL = PLAIN[:2] + b"\xff\xe1" + struct.pack(">H", len(THUMBNAIL) + 2) + THUMBNAIL + PLAIN[2:]
DAMAGED = {
    "junk before the tables": (between(PLAIN, b"\xff\xdb", b"junk\x00\x12"), "bytes between its markers"),
    "junk before the frame": (between(PLAIN, b"\xff\xc0", bytes(900)), "bytes between its markers"),
    "junk before the Huffman tables": (between(PLAIN, b"\xff\xc4", b"\x01\xff\x00\x02"), "bytes between its markers"),
    "junk before the scan": (between(PLAIN, b"\xff\xda", b"abc"), "bytes between its markers"),
    "a second start": (b"\xff\xd8" + PLAIN, "a second start marker"),
    "no end": (PLAIN[:-2], "no end marker"),
    "half an end": (PLAIN[:-1], "no end marker"),
    "bytes before the end": (PLAIN[:-2] + bytes(37) + PLAIN[-2:], "bytes after its data"),
    "bytes before the end, after a thumbnail": (
        WITH_THUMBNAIL[:-2] + bytes(37) + WITH_THUMBNAIL[-2:],
        "bytes after its data",
    ),
    **{
        f"bytes before the Huffman table {number} of a progressive file": (
            between_scans(PROGRESSIVE, b"\xff\xc4", number, bytes(37)),
            "bytes after its data",
        )
        for number in (2, 4, -1)
    },
    "bytes before two Huffman tables of a progressive file": (
        between_scans(between_scans(PROGRESSIVE, b"\xff\xc4", 3, bytes(37)), b"\xff\xc4", -1, bytes(37)),
        "bytes after its data",
    ),
    "two kinds": (
        between(b"\xff\xd8" + PLAIN, b"\xff\xc0", b"x"),
        "a second start marker and bytes between its markers",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_jpeg_with_a_damaged_structure_is_repaired(name: str) -> None:
    data, remark = DAMAGED[name]
    part = decode_part(data, None)
    np.testing.assert_array_equal(part.pixels, decode(PLAIN))
    assert image_size(data) == (60, 90)
    assert part.remarks == (f"repaired JPEG: {remark}",)
    reduced = decode_part(data, (0, 0, 60, 90), scale=2)
    assert reduced.pixels.shape[:2] == (30, 45)


def test_a_damaged_jpeg_leaves_the_part_decoder_intact() -> None:
    """A TurboJPEG decompressor reports one file's damage for every later file of the thread."""
    pytest.importorskip("turbojpeg", reason="the package has no wheel for this platform")
    intact = jpeg(photo(200, 300))
    for data, _ in DAMAGED.values():
        decode_part(data, (0, 0, 20, 20))
        assert decode_part(intact, (150, 200, 20, 20)).pixels.shape[0] < 50


def test_an_intact_jpeg_has_no_remark() -> None:
    for data in (PLAIN, PLAIN + b"trailing bytes", jpeg(progressive=True), PLAIN[:2] + b"\xff\xff" + PLAIN[2:]):
        assert decode_part(data, None).remarks == ()


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_data_stay_refused(progressive: bool) -> None:
    data = jpeg(photo(200, 300), progressive=progressive, quality=95)
    start = data.index(b"\xff\xda") + 20
    for cut in range(start, len(data) - 40, 61):
        for end in (b"", b"\xff\xd9"):
            with pytest.raises(ImageError, match="damaged or truncated"):
                decode(data[:cut] + end)


def test_a_cmyk_jpeg_with_junk_is_repaired() -> None:
    data = jpeg(photo().convert("CMYK"))
    part = decode_part(between(data, b"\xff\xc0", b"junk"), None)
    np.testing.assert_array_equal(part.pixels, decode(data))
    assert part.remarks == ("repaired JPEG: bytes between its markers",)
