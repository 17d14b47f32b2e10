"""Every supported format is decoded to RGB as a viewer shows it; other bytes raise ImageError with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from refract.augment import Augmenter, ImageError, Preprocess, decode, image_size
from refract.augment.decoding.decode import TooManyPixelsError, decode_part

RGB = np.zeros((12, 20, 3), np.uint8)
RGB[:6] = [250, 20, 30]
RGB[6:, :10] = [10, 200, 40]
RGB[6:, 10:] = [20, 30, 240]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "JPEG"])
def test_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(RGB), kind, **options)
    assert image_size(data) == (12, 20)
    np.testing.assert_allclose(decode(data).astype(int), RGB, atol=6 if kind == "JPEG" else 0)


def test_first_frame_of_a_gif() -> None:
    first, second = Image.fromarray(RGB).convert("P"), Image.new("P", (20, 12))
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(decode(data), np.array(first.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(RGB), kind, exif=exif, **options)
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert image_size(data) == upright.shape[:2]
    np.testing.assert_allclose(decode(data).astype(int), upright, atol=3)


@settings(max_examples=200)
@given(st.integers(0, 10), st.booleans(), st.integers(0, 3), st.data())
def test_exif_orientation_among_other_tags_and_damage(
    orientation: int, big: bool, before: int, data: st.DataObject
) -> None:
    """Other tags do not change the orientation; truncated or noisy EXIF data raise no error."""
    exif = Image.Exif()
    exif.endian = ">" if big else "<"
    for offset in range(before):
        exif[0x010E + offset] = "a text"  # ImageDescription, Make, Model
    exif[0x0112] = orientation
    exif[0x0131] = "Refract"
    whole = exif.tobytes()
    expected = orientation if 1 <= orientation <= 8 else 1
    size = (20, 12) if expected >= 5 else (12, 20)
    assert image_size(encoded(Image.fromarray(RGB), "JPEG", exif=whole)) == size
    cut = data.draw(st.integers(6, len(whole)))
    noise = data.draw(st.binary(max_size=8))
    damaged = whole[:cut] + noise
    assert image_size(encoded(Image.fromarray(RGB), "JPEG", exif=damaged)) in ((12, 20), (20, 12))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_reduced_decode_of_a_rotated_jpeg(orientation: int) -> None:
    large = np.kron(RGB, np.ones((20, 20, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(large), "JPEG", quality=95, exif=exif)
    result = Augmenter([{"Resize": {"size": [24, 24]}}])(data, epoch=0, index=0)
    expected = Augmenter([{"Resize": {"size": [24, 24]}}])(decode(data), epoch=0, index=0)
    assert np.abs(result.astype(int) - expected).mean() < 3


def test_grey_palette_and_one_bit() -> None:
    grey = Image.fromarray(RGB[..., 0])
    for image in (grey, grey.convert("P"), grey.convert("1")):
        np.testing.assert_array_equal(decode(encoded(image, "PNG")), np.array(image.convert("RGB")))
    np.testing.assert_allclose(
        decode(encoded(grey, "JPEG", quality=100)).astype(int), np.array(grey.convert("RGB")), atol=3
    )


def test_transparency_over_white() -> None:
    rgba = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    rgba[0, 0, 3], rgba[0, 1, 3] = 0, 51
    image = decode(encoded(Image.fromarray(rgba), "PNG"))
    assert image[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_allclose(image[0, 1].astype(int), [254, 208, 210], atol=1)  # 0.2 · colour + 0.8 · 255
    np.testing.assert_array_equal(image[1:], RGB[1:])
    palette = Image.fromarray(RGB).quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert decode(encoded(palette, "PNG", transparency=palette.getpixel((0, 0))))[0, 0].tolist() == [255, 255, 255]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_row(depth: int, colours: int, row: list[int], transparent: list[int]) -> bytes:
    """Return a PNG with one row of samples, grey or RGB. transparent: the colour of its tRNS chunk."""
    bits = "".join(f"{value:0{depth}b}" for value in row)
    bits += "0" * (-len(bits) % 8)
    head = struct.pack(">IIBBBBB", len(row) // colours, 1, depth, colours - 1, 0, 0, 0)
    body = b"\0" + int(bits, 2).to_bytes(len(bits) // 8)
    parts = {
        b"IHDR": head,
        b"tRNS": struct.pack(f">{colours}H", *transparent),
        b"IDAT": zlib.compress(body),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, part) for kind, part in parts.items())


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_every_transparent_level_of_a_grey_png(depth: int) -> None:
    largest = 2**depth - 1
    levels = sorted({0, 1, largest // 3, largest - 1, largest})
    for transparent in levels:
        expected = [255 if level == transparent else round(level * 255 / largest) for level in levels]
        image = decode(png_row(depth, 1, levels, [transparent]))
        assert image[0, :, 0].tolist() == expected, f"{depth} bits, tRNS {transparent}"


def test_bits_above_the_depth_of_a_transparent_level_are_ignored() -> None:
    assert decode(png_row(4, 1, [5, 3], [0x35]))[0, :, 0].tolist() == [255, 51]
    assert decode(png_row(8, 1, [5, 3], [0x105]))[0, :, 0].tolist() == [255, 3]
    assert decode(png_row(8, 3, [1, 2, 3, 4, 5, 6], [0x101, 2, 3]))[0].tolist() == [[255] * 3, [4, 5, 6]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128 * 257, 65535]], np.uint16)
    assert decode(encoded(Image.fromarray(values), kind))[0, :, 0].tolist() == [0, 128, 255]


def test_cmyk_jpeg() -> None:
    cmyk = Image.fromarray(RGB).convert("CMYK")
    data = encoded(cmyk, "JPEG", quality=100)
    assert image_size(data) == (12, 20)
    np.testing.assert_allclose(decode(data).astype(int), np.array(Image.open(io.BytesIO(data)).convert("RGB")), atol=1)


def test_float_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match="floating-point"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


JPEG = simplejpeg.encode_jpeg(np.kron(RGB, np.ones((8, 8, 1), np.uint8)))
PNG = encoded(Image.fromarray(RGB), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"hello, I am a text file\n", "looks like text"),
        (b"\x00\x01\x02\x03" * 9, "first bytes are 00 01 02 03"),
        (b"\xff\xd8\xff", "damaged or truncated JPEG header"),
        (JPEG[: len(JPEG) // 2], "damaged or truncated JPEG"),
        (PNG[: len(PNG) - 30], "damaged or truncated PNG"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG is not supported; render it to PNG"),
        (b"%PDF-1.7\n\x00\xff", "PDF is not supported; render each page to PNG"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL is not supported; save the image as JPEG or PNG"),
        (b"\xff\x0a" + bytes(9), "JPEG XL"),
        (b"\x1a\x45\xdf\xa3" + bytes(20), "video is not supported; save its frames as JPEG or PNG"),
        (b"RIFF\x10\0\0\0AVI LIST", "video is not supported"),
        (b"CWS\x0a" + bytes(9), "Flash"),
        (b"Rar!\x1a\x07\x00", "RAR archive is not supported; unpack it"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\x00\x00\x00\x18ftypcrx \x00\x00\x00\x01crx isom" + bytes(9), "camera raw"),
        (b"II*\x00\x10\x00\x00\x00CR\x02", "camera raw"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isommp41" + bytes(9), "video is not supported; save its frames"),
        (b"P6\n1 1\n255\nabc", "netpbm"),
        (bytes(128) + b"DICM" + bytes(9), "DICOM"),
        (b"<!DOCTYPE html><html></html>", "HTML page is not supported; download the image itself"),
        ("ein Text mit Umlaut: ü".encode("utf-16"), "looks like text"),
    ],
)
def test_unsupported_bytes_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data)


@given(st.data())
@settings(max_examples=150)
def test_damaged_bytes_are_decoded_or_raise_image_error(data: st.DataObject) -> None:
    original = bytearray(data.draw(st.sampled_from([JPEG, PNG])))
    for _ in range(data.draw(st.integers(1, 6))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(original[: data.draw(st.integers(0, len(original)))])
    try:
        pixels = decode(broken, max_pixels=1_000_000)
    except ImageError:
        return
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.shape[:2] == image_size(broken)


def test_pixel_limit_is_read_from_the_header() -> None:
    bomb = bytearray(PNG)
    # The header declares more pixels than these bytes contain.
    bomb[16:24] = struct.pack(">II", 15_000, 10_000)
    bomb[29:33] = struct.pack(">I", __import__("zlib").crc32(bytes(bomb[12:29])))
    with pytest.raises(TooManyPixelsError, match="150,000,000 pixels; the limit is 1,000,000"):
        decode(bytes(bomb), max_pixels=1_000_000)


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("size", [(100, 300), (300, 100), (40, 40), (1, 1), (17, 900)])
def test_preprocess_gives_its_size_from_any_size(resize: str, size: tuple[int, int]) -> None:
    preprocess = Preprocess(32, 48, resize=resize)
    image = np.full((*size, 3), 90, np.uint8)
    assert (preprocess(image) == 90).all() and preprocess(image).shape == (32, 48, 3)
    assert preprocess(simplejpeg.encode_jpeg(image)).shape == (32, 48, 3)


def test_preprocess_crops_the_centre() -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    image[25:75, 75:125] = 255  # the centre, half of the shorter side
    assert (Preprocess(20, 20, crop_ratio=0.5)(image)[1:-1, 1:-1] == 255).all()
    assert (Preprocess(20, 20, crop_ratio=0.6)(image)[0] == 0).all()


def test_preprocess_round_trip_and_errors() -> None:
    preprocess = Preprocess(32, 48, resize="squash", crop_ratio=1.0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
    with pytest.raises(ValueError, match="widht"):
        Preprocess.from_dict({"height": 3, "widht": 3})
    with pytest.raises(ValueError, match="resize: 'stretch'"):
        Preprocess(3, 3, resize="stretch")


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), downward=st.booleans(), box=st.tuples(*[st.floats(0, 1)] * 4))
def test_a_bmp_and_its_parts_equal_what_pillow_reads(
    height: int, width: int, downward: bool, box: tuple[float, ...]
) -> None:
    """Each width has another padding of the rows; a negative height stores the first row first."""
    pixels = np.random.default_rng(10 * height + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = bytearray(encoded(Image.fromarray(pixels), "BMP"))
    if downward:
        data[22:26] = (-height).to_bytes(4, "little", signed=True)
    by_pillow = np.asarray(Image.open(io.BytesIO(data)))
    assert image_size(bytes(data)) == (height, width) and np.array_equal(decode(bytes(data)), by_pillow)
    top, left = int(box[0] * (height - 1)), int(box[1] * (width - 1))
    part = top, left, 1 + int(box[2] * (height - top - 1)), 1 + int(box[3] * (width - left - 1))
    region = decode_part(bytes(data), part)
    assert (region.top, region.left, region.scale) == (top, left, 1)
    assert np.array_equal(region.pixels, by_pillow[top : top + part[2], left : left + part[3]])
    with pytest.raises(ImageError):
        decode(bytes(data[:-4]))
