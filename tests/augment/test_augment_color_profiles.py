"""Embedded colour profiles; orientation in every kind of metadata that programs write."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from icc_profiles import D50, P3, fixed, icc
from PIL import Image, ImageCms

from refract.augment import Augmenter, ImageError, Preprocess, decode, image_size
from refract.augment.decoding import color_profiles
from refract.augment.decoding.decode import SUFFIXES, decode_part, from_pillow

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
COLOURS = np.zeros((40, 60, 3), np.uint8)
COLOURS[:20], COLOURS[20:, :30], COLOURS[20:, 30:] = [200, 60, 40], [40, 190, 70], [120, 120, 120]


def encoded(pixels: np.ndarray, kind: str, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    image = image.convert(mode) if mode else image
    image.save(buffer, kind, **({"quality": 100} if kind in ("JPEG", "AVIF") else {}), **options)
    return buffer.getvalue()


def p3_to_srgb(pixels: np.ndarray) -> np.ndarray:
    """Convert P3 with gamma 2.2 to sRGB by the matrices of the two spaces."""
    to_xyz = np.array(P3).T
    srgb = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]])
    linear = np.clip(((pixels / 255) ** 2.2) @ (np.linalg.inv(srgb) @ to_xyz).T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_profile_is_converted_or_ignored(kind: str) -> None:
    options = (
        {"subsampling": 0}
        if kind == "JPEG"
        else {"lossless": True}
        if kind == "WEBP"
        else {"subsampling": "4:4:4"}
        if kind == "AVIF"
        else {}
    )
    data, plain = (encoded(COLOURS, kind, icc_profile=profile, **options) for profile in (icc(), None))
    np.testing.assert_array_equal(decode(data), decode(plain))
    np.testing.assert_array_equal(decode(plain, color_profile="convert"), decode(plain))
    converted = decode(data, color_profile="convert")
    np.testing.assert_allclose(converted, p3_to_srgb(decode(plain)), atol=2)
    assert np.abs(converted.astype(int) - COLOURS).max() > 10
    np.testing.assert_array_equal(from_pillow(Image.open(io.BytesIO(data)), color_profile="convert"), converted)


def test_srgb_profiles_change_nothing() -> None:
    data = encoded(COLOURS, "JPEG", icc_profile=SRGB)
    np.testing.assert_array_equal(decode(data, color_profile="convert"), decode(data))


def test_profiles_of_transparent_sixteen_bit_and_grey_images() -> None:
    rgba = np.dstack([COLOURS, np.full(COLOURS.shape[:2], 255, np.uint8)])
    rgba[0, 0, 3] = 0
    image = decode(encoded(rgba, "PNG", icc_profile=icc()), color_profile="convert")
    assert image[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_allclose(image[1:], p3_to_srgb(COLOURS)[1:], atol=2)
    grey = np.full((20, 20), 100, np.uint8)
    for data in (
        encoded(grey, "JPEG", icc_profile=icc(gamma=1.0, space=b"GRAY")),
        encoded(grey, "PNG", icc_profile=icc(gamma=1.0, space=b"GRAY")),
    ):
        assert abs(int(decode(data, color_profile="convert")[5, 5, 0]) - 168) <= 1  # linear 100/255 is 168 in sRGB
    profile = icc(gamma=1.0, space=b"GRAY")
    half = np.dstack([grey, np.tile(np.where(np.arange(20) < 10, 255, 128), (20, 1)).astype(np.uint8)])
    for data in (encoded(half, "PNG", icc_profile=profile), encoded(half, "TIFF", icc_profile=profile)):
        row = decode(data, color_profile="convert")[5].astype(int)
        np.testing.assert_allclose(row[[0, 15]], [[168] * 3, [round(168 * 128 / 255 + 127)] * 3], atol=1)
        assert decode(data)[5, 5].tolist() == [100] * 3
    spot = np.where(np.arange(20) < 10, 100, 7).astype(np.uint8)[None].repeat(20, axis=0)
    spots = decode(encoded(spot, "PNG", icc_profile=profile, transparency=7), color_profile="convert")
    np.testing.assert_allclose(spots[5, [0, 15]], [[168] * 3, [255] * 3], atol=1)
    wide = encoded(grey.astype(np.uint16) * 257, "PNG", icc_profile=icc(gamma=1.0, space=b"GRAY"))
    assert abs(int(decode(wide, color_profile="convert")[5, 5, 0]) - 168) <= 1


@pytest.mark.parametrize(
    "profile", [b"no profile at all", icc()[:200], icc()[:128] + bytes(300), icc(space=b"CMYK"), bytes(5000)]
)
def test_a_broken_profile_is_ignored_with_one_warning(profile: bytes, caplog: pytest.LogCaptureFixture) -> None:
    color_profiles._warned.clear()
    color_profiles._transform.cache_clear()  # another test of this process may have decoded the same profile
    with caplog.at_level(logging.WARNING, "refract.augment"):
        for kind in ("JPEG", "PNG"):
            data = encoded(COLOURS, kind, icc_profile=profile)
            np.testing.assert_array_equal(decode(data, color_profile="convert"), decode(data))
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        "an image has an unusable colour profile, which is ignored"
    ]


def test_a_cmyk_jpeg_with_an_rgb_profile_is_decoded() -> None:
    data = encoded(COLOURS, "JPEG", "CMYK", icc_profile=icc())
    np.testing.assert_array_equal(decode(data, color_profile="convert"), decode(data))


def cmyk_profile() -> bytes:
    """Return a printer profile with tables (lut8): no ink is white, black ink alone is L* 20."""
    corners = np.zeros((2, 2, 2, 2, 3), np.uint8)
    corners[...] = (51, 128, 128)  # L* 20, neutral
    corners[0, 0, 0, 0] = (255, 128, 128)
    identity = bytes(range(256))
    matrix = fixed((1, 0, 0, 0, 1, 0, 0, 0, 1))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + matrix + identity * 4 + corners.tobytes() + identity * 3
    table += bytes(-len(table) % 4)
    name = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    white = b"XYZ \0\0\0\0" + fixed(D50)
    tags, body = b"", b""
    for key, data in ((b"desc", name), (b"wtpt", white), (b"A2B0", table)):
        tags += key + struct.pack(">II", 132 + 36 + len(body), len(data))
        body += data
    size = 132 + 36 + len(body)
    head = struct.pack(">I4xI", size, 0x02100000) + b"prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28) + fixed(D50)
    return head.ljust(128, b"\0") + struct.pack(">I", 3) + tags + body


def test_cmyk_profiles() -> None:
    inks = np.zeros((40, 60, 4), np.uint8)
    inks[:, 30:, 3] = 160
    buffer = io.BytesIO()
    Image.fromarray(inks, "CMYK").save(buffer, "JPEG", quality=100, icc_profile=cmyk_profile())
    plain, converted = decode(buffer.getvalue()), decode(buffer.getvalue(), color_profile="convert")
    assert plain[5, 5].tolist() == [255] * 3 and abs(int(plain[5, 50, 0]) - 95) <= 2
    assert converted[5, 5].min() >= 254
    # L* 49.8 has the luminance 0.182; the black point, 0.030, becomes black: 0.157, which is 110 in sRGB.
    np.testing.assert_allclose(converted[5, 50].astype(int), [110] * 3, atol=3)


def test_training_and_preprocessing_convert_alike() -> None:
    data = encoded(np.kron(COLOURS, np.ones((4, 4, 1), np.uint8)), "JPEG", icc_profile=icc())
    expected = decode(data, color_profile="convert")
    for convert in ("convert", "ignore"):
        preprocess = Preprocess(32, 32, resize="squash", color_profile=convert)
        augmenter = Augmenter([{"Resize": {"size": 32}}], color_profile=convert)
        whole = expected if convert == "convert" else decode(data)
        reference = preprocess(whole).astype(int)
        assert np.abs(preprocess(data).astype(int) - reference).mean() < 2
        assert np.abs(augmenter(data, epoch=0, index=0).astype(int) - reference).mean() < 2
    assert Preprocess.from_dict({"height": 8, "width": 8}).color_profile == "ignore"
    with pytest.raises(ValueError, match="color_profile: 'srgb' is not one of convert, ignore"):
        Preprocess(8, 8, color_profile="srgb")
    with pytest.raises(ValueError, match="color_profile"):
        Augmenter("none", color_profile="srgb")


def test_a_part_is_converted_as_the_whole() -> None:
    data = encoded(np.kron(COLOURS, np.ones((4, 4, 1), np.uint8)), "JPEG", icc_profile=icc())
    part = decode_part(data, (40, 60, 50, 70), color_profile="convert")
    whole = decode(data, color_profile="convert")
    top, left = int(part.top), int(part.left)
    np.testing.assert_array_equal(
        part.pixels, whole[top : top + part.pixels.shape[0], left : left + part.pixels.shape[1]]
    )


ROTATED_EXIF = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
HEAD = b"Exif\0\0"


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def rotated_files() -> dict[str, bytes]:
    jpeg, png = encoded(COLOURS, "JPEG"), encoded(COLOURS, "PNG")
    start, end = 33, png.rindex(b"IEND") - 4
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP
    packed = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)
    old = b"<tiff:Orientation>6</tiff:Orientation>"
    return {
        "JPEG with one header": jpeg[:2] + segment(0xE1, HEAD + ROTATED_EXIF) + jpeg[2:],
        "JPEG with two headers": jpeg[:2] + segment(0xE1, HEAD + HEAD + ROTATED_EXIF) + jpeg[2:],
        "JPEG with XMP": jpeg[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP) + jpeg[2:],
        "JPEG with an XMP element": jpeg[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + old) + jpeg[2:],
        "PNG with EXIF": png[:start] + chunk(b"eXIf", ROTATED_EXIF) + png[start:],
        "PNG with two headers": png[:start] + chunk(b"eXIf", HEAD + HEAD + ROTATED_EXIF) + png[start:],
        "PNG with EXIF after the pixels": png[:end] + chunk(b"eXIf", ROTATED_EXIF) + png[end:],
        "PNG with XMP": png[:start] + chunk(b"iTXt", text) + png[start:],
        "PNG with compressed XMP after the pixels": png[:end] + chunk(b"iTXt", packed) + png[end:],
        "WebP with two headers": encoded(COLOURS, "WEBP", exif=HEAD + HEAD + ROTATED_EXIF),
        "WebP with XMP": encoded(COLOURS, "WEBP", xmp=XMP),
        "AVIF with EXIF": encoded(COLOURS, "AVIF", exif=HEAD + ROTATED_EXIF),
    }


@pytest.mark.parametrize("name", rotated_files())
def test_orientation_in_every_kind_of_metadata(name: str) -> None:
    data = rotated_files()[name]
    assert image_size(data) == (60, 40)
    pixels = decode(data)
    assert pixels.shape == (60, 40, 3)
    np.testing.assert_allclose(pixels[30, 35].astype(int), COLOURS[5, 30], atol=12)  # the top is on the right


def test_exif_takes_precedence_over_xmp() -> None:
    jpeg = encoded(COLOURS, "JPEG")
    upright = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, 1, 0, 0)
    data = jpeg[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP) + segment(0xE1, HEAD + upright) + jpeg[2:]
    assert image_size(data) == (40, 60)


def sixteen_bit_png(values: np.ndarray, colour_type: int, transparent: bytes) -> bytes:
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    body = chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def test_one_transparent_colour_of_a_sixteen_bit_png() -> None:
    """A neighbouring pixel with equal upper bytes stays opaque."""
    grey = np.array([[1000, 1001, 65535]])
    assert decode(sixteen_bit_png(grey, 0, struct.pack(">H", 1000)))[0, :, 0].tolist() == [255, 4, 255]
    rgb = np.array([[[1000, 2000, 3000], [1001, 2000, 3000]]])
    assert decode(sixteen_bit_png(rgb, 2, struct.pack(">3H", 1000, 2000, 3000)))[0].tolist() == [
        [255, 255, 255],
        [4, 8, 12],
    ]


def test_heic_with_and_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif", reason="the extra `heif` is not installed")
    buffer = io.BytesIO()
    heif.from_pillow(Image.fromarray(COLOURS)).save(buffer, quality=95)
    data = buffer.getvalue()
    assert image_size(data) == (40, 60)
    np.testing.assert_allclose(decode(data).astype(int)[5:15, 5:55], COLOURS[5:15, 5:55], atol=12)
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF")
    with pytest.raises(ImageError, match=r"HEIC needs an extra: pip install 'refract\[heif\]'"):
        decode(data)


def test_suffixes() -> None:
    assert {".jfif", ".jpe", ".jif", ".avif", ".heic", ".heif"} <= set(SUFFIXES)
