"""The output formats of an augmented image: uint8 H×W×C, uint8 C×H×W, normalised float32 C×H×W."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refract.augment import Augmenter
from refract.augment.preprocess import IMAGENET_MEAN, IMAGENET_STD

IMAGE = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def normalised(pixels: np.ndarray, mean, std) -> np.ndarray:
    return ((pixels / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)


def test_float32_is_the_uint8_result_normalised_by_imagenet() -> None:
    result = Augmenter("imagenet", seed=3, output="float32")(IMAGE, epoch=1, index=2)
    pixels = Augmenter("imagenet", seed=3)(IMAGE, epoch=1, index=2)
    assert result.dtype == np.float32 and result.shape == (3, 224, 224) and result.flags.c_contiguous
    np.testing.assert_allclose(result, normalised(pixels, IMAGENET_MEAN, IMAGENET_STD), atol=5e-7)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.lists(st.floats(1 / 300, 2), min_size=3, max_size=3),
)
def test_any_mean_and_std_are_applied_within_rounding(height: int, width: int, mean, std) -> None:
    """Includes gains near 1 (std near 1/255), where the running average would lose precision."""
    image = np.ascontiguousarray(np.resize(IMAGE, (height, width, 3)))
    result = Augmenter("none", output="float32", mean=mean, std=std)(image, epoch=0, index=0)
    expected = normalised(image, mean, std)
    np.testing.assert_allclose(result, expected, atol=3e-7 * max(1, np.abs(expected).max(), (1 / np.array(std)).max()))


def test_planes_are_the_transposed_pixels() -> None:
    planes = Augmenter("cifar", seed=3, output="uint8_chw")(IMAGE, epoch=0, index=0)
    np.testing.assert_array_equal(planes, Augmenter("cifar", seed=3)(IMAGE, epoch=0, index=0).transpose(2, 0, 1))
    assert planes.flags.c_contiguous


@pytest.mark.parametrize("output", ["uint8", "uint8_chw", "float32"])
@pytest.mark.parametrize("channels", [1, 3])
def test_out_is_written_in_place_and_returned(output: str, channels: int) -> None:
    options = {"mean": 0.5, "std": 0.25} if output == "float32" else {}
    augmenter = Augmenter("none", output=output, channels=channels, **options)
    expected = augmenter(IMAGE, epoch=0, index=0)
    batch = np.zeros((2, *expected.shape), expected.dtype)
    assert np.shares_memory(augmenter(IMAGE, epoch=0, index=0, out=batch[1]), batch)
    np.testing.assert_array_equal(batch[1], expected)
    assert not batch[0].any()
    plan = augmenter.draw(IMAGE.shape[:2], epoch=0, index=0)
    np.testing.assert_array_equal(augmenter.apply(plan, IMAGE, out=batch[0]), expected)


def test_out_that_does_not_fit_is_refused() -> None:
    augmenter = Augmenter("none", output="float32")
    with pytest.raises(
        ValueError, match="out: float64 3×37×53 does not fit; the result is a contiguous float32 3×37×53"
    ):
        augmenter(IMAGE, epoch=0, index=0, out=np.empty((3, 37, 53)))
    with pytest.raises(ValueError, match="out: float32 37×53×3 does not fit"):
        augmenter(IMAGE, epoch=0, index=0, out=np.empty((37, 53, 3), np.float32))


def test_one_channel_is_the_luma_and_grey_is_unchanged() -> None:
    grey = IMAGE[..., 0]
    np.testing.assert_array_equal(Augmenter("none", channels=1)(grey, epoch=0, index=0)[..., 0], grey)
    luma = Augmenter("none", channels=1, output="uint8_chw")(IMAGE, epoch=0, index=0)
    np.testing.assert_allclose(luma[0], IMAGE @ np.array([0.299, 0.587, 0.114]), atol=0.51)
    result = Augmenter("none", channels=1, output="float32", mean=0.5, std=0.25)(grey, epoch=0, index=0)
    np.testing.assert_allclose(result, (grey[None] / 255 - 0.5) / 0.25, atol=5e-7)


def test_views_have_the_output_format() -> None:
    views = Augmenter(["AugMix"], size=16, output="float32").views(IMAGE, epoch=0, index=0)
    assert views.shape == (3, 3, 16, 16) and views.dtype == np.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "float"}, r"output: 'float' is not one of uint8, uint8_chw, float32; did you mean float32\?"),
        ({"channels": 4}, r"channels: 4 is neither 3 \(RGB\) nor 1 \(luma\)"),
        ({"mean": 0.5}, "mean, std: output 'uint8' is not normalised; pass output='float32'"),
        ({"output": "float32", "channels": 1}, "channels=1 has no default; pass one number for each"),
        ({"output": "float32", "std": [0.2, 0.0, 0.2]}, r"std: \[0.2, 0.0, 0.2\] is not positive"),
        ({"output": "float32", "mean": [0.5, 0.5]}, r"mean: \[0.5, 0.5\] is neither one finite number nor 3 of them"),
    ],
)
def test_errors_name_the_option(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmenter("none", **options)
