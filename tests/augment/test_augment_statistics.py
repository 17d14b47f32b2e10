"""Streamed statistics of training images equal those of all images at once; whitened images are uncorrelated."""

import numpy as np
import pytest

from refract.augment.statistics import EPSILON, measure

RNG = np.random.default_rng(0)
BASE = RNG.normal(0, 40, (500, 4, 5, 1)) + RNG.normal(0, 15, (500, 4, 5, 3)) + [100, 120, 140]
IMAGES = np.clip(BASE, 0, 255).astype(np.uint8)
FLAT = IMAGES.transpose(0, 3, 1, 2).reshape(500, -1) / 255


@pytest.mark.parametrize("chunk", [1, 7, 500, 1000])
def test_channel_statistics_in_one_pass(chunk: int) -> None:
    statistics = measure(iter(IMAGES), "channel", chunk=chunk)
    np.testing.assert_allclose(statistics.mean, (IMAGES / 255).mean((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(statistics.std, (IMAGES / 255).std((0, 1, 2)), atol=1e-9)
    assert statistics.mean_image is None and statistics.whitening is None


def test_mean_image_is_channels_first() -> None:
    statistics = measure(IMAGES, "mean_image")
    np.testing.assert_allclose(statistics.mean_image, (IMAGES / 255).mean(0).transpose(2, 0, 1), atol=1e-7)


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_whitened_images_are_uncorrelated(kind: str) -> None:
    statistics = measure(IMAGES, kind, chunk=64)
    whitened = (FLAT - statistics.mean_image.reshape(-1)) @ statistics.whitening.T
    covariance = whitened.T @ whitened / len(whitened)
    variances = np.linalg.eigvalsh(np.cov(FLAT.T, bias=True))
    np.testing.assert_allclose(np.linalg.eigvalsh(covariance), variances / (variances + EPSILON), atol=1e-3)
    if kind == "pca":
        np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-3)
    else:
        np.testing.assert_allclose(statistics.whitening, statistics.whitening.T, atol=1e-4)


def test_a_constant_channel_has_std_one() -> None:
    flat = np.full((9, 3, 3, 3), 7, np.uint8)
    assert measure(flat, "channel").std.tolist() == [1, 1, 1]


def test_images_that_cannot_be_measured_raise_value_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        measure([], "channel")
    with pytest.raises(ValueError, match=r"several sizes: 4×5 and 3×5"):
        measure([IMAGES[0], IMAGES[0][:3]], "channel")
    with pytest.raises(ValueError, match="at most 4096 values: got 64×64×3 = 12288"):
        measure([np.zeros((64, 64, 3), np.uint8)], "zca")
