"""Pillow images and grey or RGBA arrays give an `Augmenter` the same result as their file."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refract.augment import Augmenter, ImageError, decode

RGBA = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
AUGMENTER = Augmenter("cifar", seed=3)


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "1", "I;16"])
def test_a_pillow_image_gives_the_result_of_its_file(mode: str) -> None:
    image = Image.fromarray(RGBA).convert("L" if mode == "I;16" else mode).convert(mode)
    expected = AUGMENTER(png(image), epoch=1, index=2)
    np.testing.assert_array_equal(AUGMENTER(image, epoch=1, index=2), expected)
    plan = AUGMENTER.draw((20, 30), epoch=1, index=2)
    np.testing.assert_array_equal(AUGMENTER.apply(plan, image), expected)


def test_the_orientation_of_a_pillow_image_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(RGBA[..., :3]).save(buffer, "JPEG", exif=exif)
    opened = Image.open(io.BytesIO(buffer.getvalue()))
    result = Augmenter("none")(opened, epoch=0, index=0)
    assert result.shape == (30, 20, 3)
    np.testing.assert_allclose(result, decode(buffer.getvalue()), atol=1)


def test_grey_and_transparent_arrays_are_converted_as_decode_converts_files() -> None:
    none = Augmenter("none")
    grey = RGBA[..., 0]
    for array in (grey, grey[..., None]):
        np.testing.assert_array_equal(none(array, epoch=0, index=0), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(none(RGBA, epoch=0, index=0), decode(png(Image.fromarray(RGBA))))
    before = RGBA.copy()
    none(RGBA, epoch=0, index=0)
    np.testing.assert_array_equal(RGBA, before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4)), "got float64 4×4; scale to 0…255 and convert by image.astype"),
        (np.zeros((5, 6, 2), np.uint8), r"a Pillow image, or a uint8 array .*H×W×4 \(RGBA\), got uint8 5×6×2$"),
        (np.zeros((3, 8, 9), np.uint8), r"got uint8 3×8×9; channels come last: image.transpose\(1, 2, 0\)"),
        (np.zeros((0, 4, 3), np.uint8), "got uint8 0×4×3"),
        (Path("a.jpg"), r"read a file by Path\(path\)\.read_bytes\(\)"),
        (bytearray(b"x"), r"got bytearray; convert a buffer by bytes\(data\)"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "32-bit floating-point pixels have no known range"),
    ],
)
def test_errors_name_the_accepted_inputs(image, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        Augmenter("none")(image, epoch=0, index=0)


def test_a_damaged_file_opened_lazily_is_an_image_error() -> None:
    opened = Image.open(io.BytesIO(png(Image.fromarray(np.tile(RGBA, (20, 20, 1))))[:2000]))
    with pytest.raises(ImageError, match="damaged or truncated PNG"):
        Augmenter("none")(opened, epoch=0, index=0)
