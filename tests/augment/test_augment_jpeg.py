"""A decoded part has the pixels of the whole decoded image, for any JPEG coding; the header is read without decoding."""

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from refract.augment import Augmenter, ImageError, Plan, Step, decode, image_size
from refract.augment.decoding import jpeg
from refract.augment.decoding.decode import decode_part
from refract.augment.decoding.jpeg import SCALES, JpegError, decode_whole, read_header
from refract.augment.fuse import fuse

CODINGS = [("RGB", subsampling, progressive) for subsampling in (0, 1, 2) for progressive in (False, True)]
CODINGS += [("L", -1, False), ("L", -1, True)]


def photo(height: int, width: int) -> np.ndarray:
    """Smooth colours with edges and grain, so that no two blocks are alike."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7) * 90, np.cos(y / 5) * 90, np.sin((x + y) / 11) * 90], axis=-1) + 128
    waves[(x // 16 + y // 24) % 3 == 0] *= 0.5
    return np.clip(waves + np.random.default_rng(0).normal(0, 8, waves.shape), 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, mode: str = "RGB", subsampling: int = 2, progressive: bool = False, **options) -> bytes:
    buffer = io.BytesIO()
    options |= {"subsampling": subsampling} if mode == "RGB" else {}
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", quality=85, progressive=progressive, **options)
    return buffer.getvalue()


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    height, width = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    box_height, box_width = draw(st.integers(1, height)), draw(st.integers(1, width))
    top, left = draw(st.integers(0, height - box_height)), draw(st.integers(0, width - box_width))
    return (height, width), (top, left, box_height, box_width)


def test_the_part_decoder_is_installed() -> None:
    # Every platform with a wheel of `turbojpeg` has it. Without it, the tests of parts would test `simplejpeg` only.
    pytest.importorskip("turbojpeg", reason="the package has no wheel for this platform")
    data = encoded(photo(200, 200))
    assert jpeg.decode_part(data, read_header(data), (150, 150, 20, 20)).pixels.shape[0] < 100


@given(boxes(), st.sampled_from(CODINGS), st.sampled_from(SCALES))
@settings(max_examples=150)
def test_a_part_equals_the_same_pixels_of_the_whole(shape, coding, scale) -> None:
    (height, width), (top, left, box_height, box_width) = shape
    scale = scale if min(height, width) >= jpeg.SMALLEST_REDUCED else 1
    data = encoded(photo(height, width), *coding)
    header = read_header(data)
    assert (header.height, header.width) == (height, width)
    part = jpeg.decode_part(data, header, (top, left, box_height, box_width), scale)
    rows = slice(top // scale, -(-(top + box_height) // scale))
    columns = slice(left // scale, -(-(left + box_width) // scale))
    expected = decode_whole(data, header, scale)[rows, columns]
    first_row, first_column = rows.start - int(part.top), columns.start - int(part.left)
    overlap = part.pixels[first_row:, first_column:][: expected.shape[0], : expected.shape[1]]
    np.testing.assert_array_equal(overlap, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_part_of_a_rotated_image(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(120, 200), exif=exif)
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert image_size(data) == upright.shape[:2]
    part = decode_part(data, (10, 20, 40, 30))
    top, left = 10 - int(part.top), 20 - int(part.left)
    np.testing.assert_array_equal(part.pixels[top : top + 40, left : left + 30], upright[10:50, 20:50])
    # Odd sides: the reduced image is rounded up at its end, which a rotation may move to the front.
    odd = encoded(cv2.GaussianBlur(photo(121, 203), None, 3), exif=exif)
    policy = Augmenter([{"Resize": {"size": [30, 30]}}])
    from_bytes, from_array = policy(odd, epoch=0, index=0), policy(decode(odd), epoch=0, index=0)
    assert np.abs(from_bytes.astype(int) - from_array).mean() < 1.5


POLICIES = {
    "imagenet": "imagenet",
    "rotation": [{"RandomCrop": {"size": 90}}, {"Rotate": {"degrees": 40}}],
    "edge": [{"PadAndCrop": {"padding": 30, "border": "edge"}}, {"Affine": {"degrees": 30, "translate": 0.4, "border": "edge"}}],
    "reflect": [{"Affine": {"degrees": 30, "translate": 0.4, "border": "reflect"}}],
    "reflect101": [{"Affine": {"degrees": 30, "translate": 0.4, "border": "reflect101"}}],
    "bicubic": [{"RandomResizedCrop": {"size": 90, "interpolation": "bicubic"}}, {"Rotate": {"degrees": 20, "interpolation": "bicubic"}}],
    "outside": [{"Affine": {"translate": 1.0, "fill": 77}}, {"RandomCrop": {"size": 20}}],
    "colour first": [{"ColorJitter": {"brightness": 0.4}}, {"RandomCrop": {"size": 60}}],
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_bytes_and_the_decoded_array_give_the_same_pixels(policy) -> None:
    data = encoded(photo(160, 240))
    augmenter, array = Augmenter(policy, seed=3), decode(data)
    for index in range(30):
        from_bytes, from_array = augmenter(data, epoch=0, index=index), augmenter(array, epoch=0, index=index)
        # If a warp counts from another corner, a value half-way between two levels may round to either.
        assert np.abs(from_bytes.astype(int) - from_array).max() <= 1


def test_without_turbojpeg_the_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(300, 400))
    augmenter = Augmenter("imagenet", seed=1)
    with_parts = [augmenter(data, epoch=0, index=i) for i in range(10)]
    monkeypatch.setattr(jpeg, "_decoder", lambda: None)
    without = [augmenter(data, epoch=0, index=i) for i in range(10)]
    for expected, actual in zip(with_parts, without, strict=True):
        assert np.abs(actual.astype(int) - expected).max() <= 1


def test_a_truncated_file_is_refused_if_the_part_needs_the_missing_data() -> None:
    data = encoded(photo(200, 200))
    cut = data[: len(data) // 2]
    with pytest.raises(ImageError, match="damaged or truncated JPEG"):
        decode_part(cut, (150, 0, 50, 200))
    with pytest.raises(ImageError, match="damaged or truncated JPEG"):
        decode(cut)


@given(st.binary(max_size=80))
def test_any_bytes_after_the_magic_are_refused_or_a_header(tail: bytes) -> None:
    try:
        header = read_header(b"\xff\xd8\xff" + tail)
    except JpegError:
        return
    assert header.height > 0 and header.width > 0


def test_header_with_fill_bytes_comments_and_a_late_frame() -> None:
    data = encoded(photo(30, 50), comment=b"x" * 5000, exif=Image.Exif().tobytes() or b"", icc_profile=b"p" * 70_000)
    filled = data[:2] + b"\xff\xff" + data[2:]
    assert (read_header(data).height, read_header(filled).width) == (30, 50)


def test_a_jpeg_with_thousands_of_scans_is_refused_before_decoding() -> None:
    data = encoded(photo(64, 64), progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:-2] + data[last:-2] * 2000 + b"\xff\xd9"
    assert image_size(data) == (64, 64)
    with pytest.raises(ImageError, match=r"2,0\d\d scans; at most 100"):
        decode(bomb)
    baseline = encoded(photo(64, 64))
    hidden = baseline[:-2] + b"\xff\xda\x00\x02" * 200 + b"\xff\xd9"
    with pytest.raises(ImageError, match="scans"):
        decode(hidden, max_pixels=10**6)


def test_the_decoded_part_contains_all_pixels_that_a_warp_reads() -> None:
    """A rotation of a crop reads beyond the crop's edges: with too small a part, its corners would show the fill."""
    array = np.full((300, 300, 3), 200, np.uint8)
    flat = encoded(array)
    policy = [{"RandomCrop": {"size": 60}}, {"Rotate": {"degrees": [-30, 30]}}, {"RandomScale": {"scale": [0.1, 2.5]}}]
    augmenter, seen = Augmenter(policy), 0
    for index in range(100):
        plan = augmenter.draw((300, 300), epoch=0, index=index)
        top, left, height, width = fuse(plan)[0].footprint((300, 300))
        if top > 0 and left > 0 and top + height < 300 and left + width < 300:
            seen += 1
            assert augmenter.apply(plan, flat).min() >= 198
            assert augmenter.apply(plan, array).min() == 200
    assert seen > 20


def test_damage_inside_a_part_is_refused() -> None:
    data = bytearray(encoded(photo(200, 200)))
    start = data.index(b"\xff\xda") + 400
    data[start : start + 40] = b"\xff\xd0" * 20  # restart markers in invalid positions
    with pytest.raises(ImageError, match="damaged or truncated JPEG"):
        decode_part(bytes(data), (100, 0, 100, 200))


@given(st.floats(-60, 60), st.floats(0.2, 4.0), st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=100)
def test_a_footprint_contains_every_interpolated_pixel(angle: float, scale: float, top: int, left: int) -> None:
    steps = (
        Step("RandomCrop", {"box": [top, left, 40, 50], "size": [40, 50]}),
        Step("Affine", {"angle": angle, "scale": 1.0}),
        Step("RandomScale", {"box": [0, 0, 40, 50], "size": [max(1, round(40 * scale)), max(1, round(50 * scale))]}),
    )
    (item,) = fuse(Plan((240, 250), steps))
    a, b, c, d, e, f = item.matrix[:6]
    y, x = np.mgrid[: item.size[0], : item.size[1]] + 0.5
    rows, columns = np.floor(d * x + e * y + f - 0.5), np.floor(a * x + b * y + c - 0.5)
    box_top, box_left, height, width = item.footprint((240, 250))
    assert box_top <= max(0, rows.min()) and box_left <= max(0, columns.min())
    assert box_top + height > min(239, rows.max() + 1) and box_left + width > min(249, columns.max() + 1)
