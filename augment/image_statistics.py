"""Image statistics: brightness, contrast and sharpness of an image array. Independent of networks and files."""

from typing import NamedTuple

import cv2
import numpy as np


class ImageStatistics(NamedTuple):
    """Statistics of an image's grey levels, scaled to 0…1.

    brightness: mean. contrast: standard deviation. sharpness: standard deviation of the Laplacian; blur lowers it, noise raises it.
    """

    brightness: float
    contrast: float
    sharpness: float


def measure_image(pixels: np.ndarray) -> ImageStatistics:
    """Measure an RGB image, uint8 H×W×3. ValueError for another array.

    Sharpness depends on the size, so compare images of one size only.
    Source of the sharpness: Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy", which takes the variance.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels: {pixels.dtype} of shape {pixels.shape}, expected uint8 H×W×3")
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    mean, deviation = cv2.meanStdDev(grey)
    _, sharpness = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))
    return ImageStatistics(*(float(value[0, 0]) / 255 for value in (mean, deviation, sharpness)))
