"""Each corruption has its documented effect, grows with the severity and repeats from its seed."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refract.augment import Augmenter
from refract.augment.ops.corruption import CORRUPTIONS, corrupt


def photo(height: int = 224, width: int = 224) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9) + np.cos(y / 13), np.cos(x / 11 + y / 17), np.sin((x + y) / 23)], -1)
    waves[(x // 28 + y // 28) % 3 == 0] *= 0.3
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 1))
    return np.clip(115 + 45 * waves + grain, 0, 255).astype(np.uint8)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other).mean())


def hidden(one: np.ndarray, other: np.ndarray) -> float:
    """100 × (1 − correlation of the images): independent of brightness and contrast."""
    return 100 * (1 - np.corrcoef(one.ravel(), other.ravel())[0, 1])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_grows_with_severity_and_repeats_from_its_seed(name: str) -> None:
    image = photo()
    before = image.copy()
    measure = hidden if name in ("fog", "frost") else distance
    levels = [np.mean([measure(corrupt(image, name, s, seed=k), image) for k in range(3)]) for s in range(1, 6)]
    assert levels[0] > 0.5, "severity 1 is visible"
    if name not in ("saturate", "elastic_transform", "snow"):  # the paper varies several constants with their severity
        assert all(after > 0.9 * before for before, after in pairwise(levels)), levels
        assert levels[4] > 1.1 * levels[0], levels
    np.testing.assert_array_equal(corrupt(image, name, 3, seed=9), corrupt(image, name, 3, seed=9))
    np.testing.assert_array_equal(image, before)


DRAWN = set(CORRUPTIONS) - {
    "defocus_blur", "zoom_blur", "gaussian_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "saturate",
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_seed_matters_for_random_corruptions_only(name: str) -> None:
    same = np.array_equal(corrupt(photo(), name, 3, seed=1), corrupt(photo(), name, 3, seed=2))
    assert same == (name not in DRAWN)


@pytest.mark.parametrize("name", CORRUPTIONS)
@given(height=st.integers(1, 40), width=st.integers(1, 40), severity=st.integers(1, 5))
@settings(max_examples=15)
def test_shape_and_dtype_at_any_size(name: str, height: int, width: int, severity: int) -> None:
    image = photo(height, width)
    result = corrupt(image, name, severity, seed=0)
    assert (result.shape, result.dtype) == (image.shape, np.uint8)


@pytest.mark.parametrize(
    ("name", "spread"),
    [("gaussian_noise", 0.18), ("speckle_noise", 0.35 * 100 / 255), ("shot_noise", (100 / 255 / 12) ** 0.5)],
)
def test_noise_has_the_strength_of_the_paper(name: str, spread: float) -> None:
    flat = np.full((128, 128, 3), 100, np.uint8)
    noise = corrupt(flat, name, 3, seed=0).astype(float) - 100
    assert noise.std() == pytest.approx(255 * spread, rel=0.06)


def test_effects_of_simple_corruptions() -> None:
    image = photo()
    flat = np.full((64, 64, 3), 100, np.uint8)
    for name in ("gaussian_blur", "glass_blur", "defocus_blur", "motion_blur", "zoom_blur", "pixelate"):
        assert distance(corrupt(flat, name, 5, seed=0), flat) <= 1, "a uniform image is unchanged"
        assert (
            np.diff(corrupt(image, name, 5, seed=0).astype(int), axis=1).std()
            < np.diff(image.astype(int), axis=1).std()
        )
    assert corrupt(flat, "brightness", 2, seed=0)[0, 0].tolist() == [151, 151, 151]
    contrast = corrupt(image, "contrast", 1, seed=0).astype(float)
    assert contrast.std((0, 1)) == pytest.approx(0.4 * image.std((0, 1)), rel=0.02)
    assert corrupt(image, "saturate", 2, seed=0).astype(int).std(2).mean() < 0.2 * image.astype(int).std(2).mean()
    assert (corrupt(image, "impulse_noise", 5, seed=0) == 255).mean() == pytest.approx(0.135, abs=0.01)
    dark = np.full((224, 224, 3), 60, np.uint8)
    dark[0, 0] = 255  # fog scales with the brightest value
    for name in ("snow", "fog", "frost"):
        assert corrupt(dark, name, 2, seed=0).mean() > 70, "the corruption brightens a dark image"


def test_glass_blur_spreads_in_proportion_to_the_side() -> None:
    spreads = []
    for side in (224, 448):
        line = np.zeros((side, side, 3), np.uint8)
        line[:, side // 2] = 255
        mass = np.mean([corrupt(line, "glass_blur", 1, seed=seed)[..., 0].sum(0) for seed in range(4)], axis=0)
        spreads.append(np.sqrt(np.average((np.arange(side) - side // 2) ** 2, weights=mass)))
    assert spreads[1] == pytest.approx(2 * spreads[0], rel=0.12)


def test_op_draws_every_name_and_severity() -> None:
    augmenter = Augmenter(["Corruption"])
    steps = [augmenter.draw((20, 20), epoch=0, index=i).steps[0].args for i in range(600)]
    assert {step["name"] for step in steps} == set(CORRUPTIONS) and {step["severity"] for step in steps} == {
        1,
        2,
        3,
        4,
        5,
    }
    only = Augmenter([{"Corruption": {"names": ["fog", "snow"], "severity": 2}}])
    assert {only.draw((20, 20), epoch=0, index=i).steps[0].args["name"] for i in range(40)} == {"fog", "snow"}


@pytest.mark.parametrize("severity", [0, 6, -1, 2.5, True])
def test_invalid_severity_is_rejected(severity) -> None:
    with pytest.raises(ValueError, match="severity: .* is not a whole number in 1…5"):
        corrupt(np.zeros((8, 8, 3), np.uint8), "fog", severity, seed=1)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_result_does_not_depend_on_the_memory_layout(name: str) -> None:
    image = np.random.default_rng(3).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    column_major = np.asfortranarray(image)
    np.testing.assert_array_equal(corrupt(column_major, name, 3, seed=4), corrupt(image, name, 3, seed=4))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * float(np.log10(255**2 / np.square(one.astype(float) - other).mean()))


# Means over 400 crops of the authors' five frost photos on `photo()`, and over 150 of their plasma maps on a grey image.
@pytest.mark.parametrize(
    ("severity", "frost", "fog"), [(1, 12.0, 22.5), (2, 10.8, 25.2), (3, 10.2, 30.4), (4, 10.8, 31.9), (5, 10.5, 34.5)]
)
def test_frost_and_fog_match_the_strength_of_the_authors_code(severity: int, frost: float, fog: float) -> None:
    image = photo()
    assert np.mean([psnr(corrupt(image, "frost", severity, seed=k), image) for k in range(20)]) == pytest.approx(
        frost, rel=0.1
    )
    grey = np.full((224, 224, 3), 100, np.uint8)
    grey[0, 0] = 255  # fog scales with the brightest value
    contrast = np.mean([corrupt(grey, "fog", severity, seed=k).std() for k in range(30)])
    assert contrast == pytest.approx(fog, rel=0.1)


def test_fog_has_the_same_strength_at_other_sizes() -> None:
    for side in (32, 448):
        grey = np.full((side, side, 3), 100, np.uint8)
        grey[0, 0] = 255
        assert np.mean([corrupt(grey, "fog", 2, seed=k).std() for k in range(20)]) == pytest.approx(25.2, rel=0.1)
