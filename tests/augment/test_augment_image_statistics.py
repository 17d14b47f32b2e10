"""Brightness, contrast and sharpness of an image."""

import cv2
import numpy as np
import pytest

from refract.augment.image_statistics import measure_image


def test_statistics_describe_the_grey_levels() -> None:
    flat = np.full((20, 30, 3), 51, np.uint8)
    assert measure_image(flat) == pytest.approx((0.2, 0, 0), abs=1e-6)
    halves = flat.copy()
    halves[:, 15:] = 255
    assert measure_image(halves)[:2] == pytest.approx((0.6, 0.4), abs=1e-6) and measure_image(halves).sharpness > 0.1


def test_blur_lowers_sharpness_and_gain_raises_brightness() -> None:
    pixels = np.random.default_rng(0).integers(0, 180, (64, 64, 3), dtype=np.uint8)
    original, blurred = measure_image(pixels), measure_image(cv2.GaussianBlur(pixels, (0, 0), 1.0))
    assert blurred.sharpness < 0.3 * original.sharpness
    assert blurred.brightness == pytest.approx(original.brightness, abs=0.01)
    brighter = measure_image((pixels * 1.3).astype(np.uint8))
    assert brighter.brightness == pytest.approx(1.3 * original.brightness, rel=0.02)


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="expected uint8 H×W×3"):
        measure_image(np.zeros((4, 4), np.uint8))
