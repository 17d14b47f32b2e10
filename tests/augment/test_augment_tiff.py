"""Every TIFF layout gives the pixels that its tags declare, or raises an ImageError with the layout and a remedy."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, TiffImagePlugin

from refract.augment import ImageError, decode, image_size
from refract.augment.decoding.decode import decode_part

HEIGHT, WIDTH = 11, 19
ORDERS = ("<", ">")


def ramp(dtype: str, channels: int, bits: int | None = None) -> np.ndarray:
    """Return H×W×C pixels from the smallest to the largest value; the channels differ."""
    kind = np.dtype(dtype)
    info = np.iinfo(kind) if kind.kind in "ui" else None
    low, high = (info.min, info.max) if info else (0.0, 1.0)
    high = 2**bits - 1 if bits else high
    line = np.linspace(0, 1, WIDTH)[None, :, None] ** np.arange(1, channels + 1)
    field = low + (high - low) * np.broadcast_to(line, (HEIGHT, WIDTH, channels))
    if info is None:
        return field.astype(kind)
    return np.array([min(int(value), int(high)) for value in np.rint(field).ravel()]).reshape(field.shape).astype(kind)


def written(pixels: np.ndarray, photometric: str, order: str, **options) -> bytes:
    buffer = io.BytesIO()
    if options.get("planarconfig") == "separate":
        pixels = np.moveaxis(pixels, -1, 0)
    elif pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    options = {"rowsperstrip": 4, "metadata": None} | options
    if "tile" in options:
        del options["rowsperstrip"]
    tifffile.imwrite(buffer, pixels, photometric=photometric, byteorder=order, **options)
    return buffer.getvalue()


def eight_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint((values.astype(np.float64) - low) * 255 / (high - low)).clip(0, 255).astype(int)


def expected_of(pixels: np.ndarray, photometric: str, extra: str | None) -> np.ndarray:
    """Return the expected RGB pixels by a second implementation of the documented rule."""
    full = np.iinfo(pixels.dtype).max
    colours = {"minisblack": 1, "miniswhite": 1, "rgb": 3}[photometric]
    colour = eight_bits(pixels[..., :colours], 0, full)
    colour = 255 - colour if photometric == "miniswhite" else colour
    if extra in ("unassalpha", "assocalpha"):
        alpha = eight_bits(pixels[..., colours:], 0, full)
        over = colour * alpha / 255 + 255 - alpha if extra == "unassalpha" else np.minimum(colour, alpha) + 255 - alpha
        colour = over
    return np.broadcast_to(colour, (HEIGHT, WIDTH, 3))


LAYOUTS = [
    (dtype, photometric, extra, planar, compression)
    for dtype, (photometric, extra), planar, compression in itertools.product(
        ("uint8", "uint16", "uint32"),
        (("minisblack", None), ("miniswhite", None), ("rgb", None), ("rgb", "unassalpha"), ("minisblack", "unassalpha"),
         ("miniswhite", "unassalpha"), ("rgb", "unspecified")),
        ("contig", "separate"),
        (None, "zlib", "predictor", "tile"),
    )
    if planar == "contig" or photometric == "rgb"
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "photometric", "extra", "planar", "compression"), LAYOUTS)
def test_unsigned_samples(dtype: str, photometric: str, extra: str | None, planar: str, compression) -> None:
    pixels = ramp(dtype, {"rgb": 3}.get(photometric, 1) + (extra is not None))
    options: dict = {"planarconfig": planar} if pixels.shape[-1] > 1 else {}
    options |= {"extrasamples": [extra]} if extra else {}
    if compression == "tile":
        options |= {"tile": (16, 16)}
    elif compression:
        options |= {"compression": "zlib", "predictor": compression == "predictor"}
    for order in ORDERS:
        data = written(pixels, photometric, order, **options)
        assert image_size(data) == (HEIGHT, WIDTH)
        image = decode(data).astype(int)
        assert np.abs(image - expected_of(pixels, photometric, extra)).max() <= (1 if extra else 0)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "float16", "float32", "float64"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_samples_without_a_default_range(dtype: str, channels: int, order: str) -> None:
    pixels, photometric = ramp(dtype, channels), "rgb" if channels == 3 else "minisblack"
    with pytest.raises(
        ImageError, match=r"has no known range; save it as unsigned 8 or 16 bits, or set SMinSampleValue"
    ):
        decode(written(pixels, photometric, order))
    low, high = (0.0, 0.5) if np.dtype(dtype).kind == "f" else (-100.0, 27.0)
    tags = [
        (code, "d", channels, (value,) * channels if channels > 1 else value, False)
        for code, value in ((340, low), (341, high))
    ]
    compress = {"compression": "zlib", "predictor": dtype in ("int16", "int32")}
    data = written(pixels, photometric, order, extratags=tags, **compress)
    np.testing.assert_allclose(decode(data), np.broadcast_to(eight_bits(pixels, low, high), (HEIGHT, WIDTH, 3)), atol=1)


def test_floating_point_predictor() -> None:
    """Encodes by TIFF Technical Note 3: the bytes of a row by significance, then their differences."""
    pixels = ramp("float32", 1)[..., 0]
    planes = pixels.astype(">f4").view(np.uint8).reshape(HEIGHT, WIDTH, 4).transpose(0, 2, 1).reshape(HEIGHT, -1)
    rows = np.diff(planes, axis=1, prepend=np.uint8(0)).astype(np.uint8)
    tags = [(258, 32), (262, 1), (317, 3), (339, 3), (340, 0), (341, 1)]
    data = hand_written(zlib.compress(rows.tobytes()), tags, compression=8)
    np.testing.assert_allclose(decode(data)[..., 0], eight_bits(pixels, 0, 1), atol=0)


def test_twelve_bits_in_sixteen() -> None:
    pixels = ramp("uint16", 1, bits=12)
    declared = written(pixels, "minisblack", "<", extratags=[(341, "H", 1, 4095, False)])
    part = decode_part(declared, None)
    np.testing.assert_array_equal(part.pixels[..., 0], eight_bits(pixels, 0, 4095)[..., 0])
    assert part.remarks == ()
    undeclared = decode_part(written(pixels, "minisblack", "<"), None)
    assert undeclared.pixels.max() == 16  # never scaled by the values of one image
    assert "nearly black: its samples reach 4095 of 16 bits; set SMaxSampleValue" in undeclared.remarks[0]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_an_unusable_range_of_unsigned_samples_is_ignored(dtype: str) -> None:
    """Some writers declare the range 0 to 0."""
    pixels = ramp(dtype, 3)
    tags = [(code, "H", 3, (0, 0, 0), False) for code in (340, 341)]
    image = decode(written(pixels, "rgb", "<", extratags=tags))
    np.testing.assert_array_equal(image, decode(written(pixels, "rgb", "<")))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", [{"compression": "jpeg"}, {"compression": "tiff_lzw"}, {}])
@pytest.mark.parametrize(("low", "high"), [(0, 0), (None, 0), (255, 255), (9, 3)])
def test_an_unusable_range_leaves_eight_bits_to_pillow(mode: str, options: dict, low: int | None, high: int) -> None:
    image, buffer = Image.fromarray(ramp("uint8", 3)).convert(mode), io.BytesIO()
    image.save(buffer, "TIFF", **options)
    np.testing.assert_array_equal(decode(with_range(image, low, high, **options)), decode(buffer.getvalue()))


def test_an_unusable_range_with_reversed_bits() -> None:
    pixels = ramp("uint8", 1)
    reversed_bits = bytes(int(f"{value:08b}"[::-1], 2) for value in pixels.tobytes())
    image = decode(hand_written(reversed_bits, [(258, 8), (262, 1), (266, 2), (340, 0), (341, 0)]))
    np.testing.assert_array_equal(image[..., :1], pixels)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(("photometric", "samples"), [(0, 1), (1, 1), (2, 3)])
def test_undefined_samples_are_read_as_unsigned(dtype: str, photometric: int, samples: int) -> None:
    strip = ramp(dtype, samples).tobytes()
    tags = [(258, 8 * np.dtype(dtype).itemsize), (262, photometric)]
    plain = decode(hand_written(strip, tags, samples=samples))
    np.testing.assert_array_equal(decode(hand_written(strip, [*tags, (339, 4)], samples=samples)), plain)


def ycbcr(strip: bytes, *, subsampling: int | None, compression: int = 1) -> bytes:
    """Return a TIFF of YCbCr samples. subsampling: the factor in both directions; None writes no tag."""
    data = bytearray(hand_written(strip, [(258, 8), (262, 6), *([(530, 0)] if subsampling else [])], compression, 3))
    if subsampling:
        entry = data.find(struct.pack("<HH", 530, 4))
        struct.pack_into("<HHIHH", data, entry, 530, 3, 2, subsampling, subsampling)
    return bytes(data)


def test_subsampled_ycbcr() -> None:
    """TIFF's default is 2×2; some writers omit the tag although each pixel has a colour sample."""
    full = np.full((HEIGHT, WIDTH, 3), (90, 128, 128), np.uint8).tobytes()
    halved = bytes([90, 90, 90, 90, 128, 128]) * (-(-HEIGHT // 2) * -(-WIDTH // 2))
    for subsampling in (1, None):
        assert (decode(ycbcr(full, subsampling=subsampling)) == 90).all()
    for subsampling in (2, None):
        with pytest.raises(
            ImageError, match="YCbCr channels of 8 bits with 2×2 colour subsampling is not supported; save"
        ):
            decode(ycbcr(halved, subsampling=subsampling) + full)  # Pillow would read past the strip
    with pytest.raises(
        ImageError, match="an uncompressed TIFF of 3 YCbCr channels of 8 bits with planes is not supported"
    ):
        decode(hand_written(full, [(258, 8), (262, 6), (284, 2)], samples=3))
    packed = ycbcr(zlib.compress(halved), subsampling=2, compression=8)
    np.testing.assert_allclose(decode(packed), 90, atol=1)


def with_range(image: Image.Image, low: int | None, high: int, **options) -> bytes:
    """Return a TIFF, written by Pillow, that declares the range of its samples."""
    buffer, tags = io.BytesIO(), TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in ((340, low), (341, high)):
        if value is not None:
            tags.tagtype[tag], tags[tag] = 3, value
    image.save(buffer, "TIFF", tiffinfo=tags, **options)
    data = bytearray(buffer.getvalue())
    for tag, value in ((340, low), (341, high)):
        entry = data.find(struct.pack("<HHI", tag, 1, 3))
        if entry > 0:  # libtiff writes one byte for each sample, and Pillow gives it zeros
            data[entry + 8 : entry + 11] = bytes([value or 0] * 3)
    return bytes(data)


@pytest.mark.parametrize(
    ("mode", "low", "high", "options"),
    [
        ("RGB", 0, 255, {"compression": "jpeg"}),
        ("RGB", None, 255, {"compression": "tiff_lzw"}),
        ("YCbCr", 16, 235, {}),
        ("P", 0, 13, {}),
        ("1", 0, 1, {"compression": "group4"}),
        ("1", 0, 255, {}),
        ("L", 0, 255, {}),
    ],
)
def test_a_declared_full_range_changes_nothing(mode: str, low: int | None, high: int, options: dict) -> None:
    image = Image.fromarray(ramp("uint8", 3)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    declared = with_range(image, low, high, **options)
    assert 341 in Image.open(io.BytesIO(declared)).getexif()
    np.testing.assert_array_equal(decode(declared), decode(buffer.getvalue()))


def test_a_narrower_range_of_eight_bits_is_applied() -> None:
    pixels = ramp("uint8", 1, bits=7)
    data = with_range(Image.fromarray(pixels[..., 0]), 0, 127)
    np.testing.assert_array_equal(decode(data)[..., 0], eight_bits(pixels, 0, 127)[..., 0])


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 10, 12, 14, 24])
@pytest.mark.parametrize("photometric", [0, 1])
def test_packed_bits(bits: int, photometric: int) -> None:
    values = np.rint(np.linspace(0, 2**bits - 1, WIDTH)).astype(np.int64)
    row = np.array([[int(bit) for bit in f"{value:0{bits}b}"] for value in values], np.uint8).reshape(-1)
    strip = np.tile(np.packbits(row), (HEIGHT, 1)).tobytes()
    data = hand_written(strip, [(258, bits), (262, photometric)])
    expected = eight_bits(values, 0, 2**bits - 1)
    np.testing.assert_array_equal(decode(data)[3, :, 1], 255 - expected if photometric == 0 else expected)


def hand_written(strip: bytes, tags: list[tuple[int, int]], compression: int = 1, samples: int = 1) -> bytes:
    fields = {256: WIDTH, 257: HEIGHT, 259: compression, 273: 0, 277: samples, 278: HEIGHT, 279: len(strip)} | dict(
        tags
    )
    start = 8 + 2 + 12 * len(fields) + 4
    fields[273] = start
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, fields[tag]) for tag in sorted(fields))
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + struct.pack("<I", 0) + strip


@pytest.mark.parametrize(
    ("compression", "code"), [("tiff_lzw", 5), ("packbits", 32773), ("tiff_deflate", 32946), ("zstd", 50000)]
)
def test_compressions_of_libtiff(compression: str, code: int) -> None:
    pixels = ramp("uint16", 3)
    as_bytes = Image.fromarray(pixels.view(np.uint8).reshape(HEIGHT, -1))
    buffer = io.BytesIO()
    as_bytes.save(buffer, "TIFF", compression=compression)
    page = tifffile.TiffFile(io.BytesIO(buffer.getvalue())).pages[0]
    strips = [buffer.getvalue()[at : at + n] for at, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
    assert len(strips) == 1
    data = hand_written(strips[0], [(258, 16), (262, 2)], code, samples=3)
    np.testing.assert_array_equal(decode(data), eight_bits(pixels, 0, 65535))
    with pytest.raises(ImageError, match="damaged or truncated TIFF"):
        decode(data[:-9])


def test_pillows_pixel_limit_does_not_reach_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.arange(HEIGHT * WIDTH, dtype="<u2").reshape(HEIGHT, WIDTH, 1) * 300
    packed = b"".join(bytes([len(row) - 1]) + row for row in (line.tobytes() for line in pixels))  # PackBits, literal
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    image = decode(hand_written(packed, [(258, 16), (262, 1)], 32773))
    np.testing.assert_array_equal(image[..., 0], eight_bits(pixels, 0, 65535)[..., 0])


def test_tiles_far_larger_than_their_image_are_refused() -> None:
    tags = [(258, 16), (262, 1), (322, 1 << 16), (323, 1 << 16), (324, 8), (325, 99)]
    with pytest.raises(ImageError, match="tiles of 65536×65536 for an image of 11×19"):
        decode(hand_written(bytes(99), tags, 5))


@pytest.mark.parametrize("extra", ["unassalpha", "assocalpha"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("photometric", ["minisblack", "rgb"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_transparency_over_white(extra: str, dtype: str, photometric: str, planar: str) -> None:
    """Includes premultiplied alpha: Pillow's modes La and RGBa."""
    full, colours = np.iinfo(dtype).max, 3 if photometric == "rgb" else 1
    alpha = np.broadcast_to(np.linspace(0, full, WIDTH), (HEIGHT, WIDTH)).astype(dtype)
    colour = (alpha // 2 if extra == "assocalpha" else np.full_like(alpha, full // 2))[..., None].repeat(
        colours, axis=-1
    )
    pixels = np.concatenate([colour, alpha[..., None]], axis=-1)
    data = written(pixels, photometric, "<", extrasamples=[extra], planarconfig=planar)
    opacity = alpha / full
    np.testing.assert_allclose(decode(data)[..., 1], 127.5 * opacity + 255 * (1 - opacity), atol=2)


def test_premultiplied_colour_is_rounded_without_a_bias() -> None:
    """Over white it is colour + 255 - alpha. Each of the two divisions rounds."""
    colour = np.arange(255, dtype=np.uint16).reshape(1, 255, 1).repeat(3, axis=2)
    pixels = 257 * np.concatenate([colour, np.full((1, 255, 1), 254, np.uint16)], axis=2)
    error = decode(written(pixels, "rgb", "<", extrasamples=["assocalpha"])) - (colour + 1.0)
    assert abs(error).max() <= 1 and abs(error.mean()) < 0.1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_sixteen_bits(orientation: int) -> None:
    from PIL import ImageOps

    options = {"extratags": [(274, "H", 1, orientation, False)]}
    wide, narrow = (written(ramp(dtype, 3), "rgb", "<", **options) for dtype in ("uint16", "uint8"))
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(narrow))))
    assert image_size(wide) == shown.shape[:2]
    np.testing.assert_allclose(decode(wide).astype(int), shown, atol=1)


def test_sixteen_bit_cmyk() -> None:
    pixels = ramp("uint16", 4)
    narrow = Image.fromarray(eight_bits(pixels, 0, 65535).astype(np.uint8), "CMYK")
    np.testing.assert_array_equal(
        decode(written(pixels, "separated", "<", planarconfig="contig")), np.asarray(narrow.convert("RGB"))
    )


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_cmyk_with_transparency(dtype: str, planar: str) -> None:
    pixels = ramp(dtype, 5)
    levels = eight_bits(pixels, 0, np.iinfo(dtype).max)
    ink, alpha = levels[..., :4].astype(np.uint8), levels[..., 4:] / 255
    opaque = np.asarray(Image.fromarray(ink, "CMYK").convert("RGB"))
    data = written(pixels, "separated", "<", planarconfig=planar, extrasamples=["unassalpha"])
    np.testing.assert_allclose(decode(data), opaque * alpha + 255 * (1 - alpha), atol=1)


@pytest.mark.parametrize("largest", [65535, 255])
def test_a_palette_of_eight_or_sixteen_bits(largest: int) -> None:
    colours = np.linspace([0, 40, 255], [255, 3, 0], 256).round().astype(int)
    image = written(ramp("uint8", 1), "palette", "<", colormap=(colours * (largest // 255)).astype(np.uint16).T)
    np.testing.assert_array_equal(decode(image), colours[ramp("uint8", 1)[..., 0]])


def test_bigtiff() -> None:
    pixels = ramp("uint16", 3)
    np.testing.assert_array_equal(decode(written(pixels, "rgb", ">", bigtiff=True)), eight_bits(pixels, 0, 65535))


@pytest.mark.parametrize(
    ("pixels", "options", "reason"),
    [
        (
            ramp("uint16", 2),
            {"photometric": "minisblack", "planarconfig": "contig"},
            "2-channel TIFF without colour or alpha",
        ),
        (ramp("uint8", 2), {"photometric": "minisblack", "planarconfig": "contig"}, "2-channel TIFF"),
        (ramp("uint8", 5), {"photometric": "minisblack", "planarconfig": "contig"}, "5-channel TIFF"),
        (ramp("uint8", 3), {"photometric": "cielab"}, "CIELab"),
        (ramp("uint16", 1), {"photometric": "cfa"}, "camera raw is not supported; develop it"),
    ],
)
def test_unsupported_layouts_are_refused_by_name(pixels: np.ndarray, options: dict, reason: str) -> None:
    photometric = options.pop("photometric")
    with pytest.raises(ImageError, match=reason):
        decode(written(pixels, photometric, "<", **options))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_truncated_and_hostile_files(dtype: str) -> None:
    data = written(ramp(dtype, 3), "rgb", "<")
    for cut in range(0, len(data) - 1, 37):
        with pytest.raises(ImageError):
            decode(data[:cut])
    huge = bytearray(written(ramp("uint16", 1), "minisblack", "<"))
    for tag in (256, 257):
        place = huge.find(struct.pack("<H", tag))
        huge[place : place + 12] = struct.pack("<HHII", tag, 4, 1, 2**31 - 1)
    with pytest.raises(ImageError):
        decode(bytes(huge))
