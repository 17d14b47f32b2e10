"""How an image looks, in three plain numbers: how bright, how rich in contrast, how sharp. Knows nothing of networks or files."""

from typing import NamedTuple

import cv2
import numpy as np


class ImageStatistics(NamedTuple):
    """Of an image's grey levels in 0…1. brightness: their mean; contrast: their standard deviation; sharpness: the standard deviation of
    their Laplacian, which falls with blur and rises with noise."""

    brightness: float
    contrast: float
    sharpness: float


def look(pixels: np.ndarray) -> ImageStatistics:
    """Of uint8 H×W×3, RGB, of one size for all images that are to be compared: sharpness depends on it. ValueError for another array.

    Source of the sharpness: Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy", which takes the variance.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels: {pixels.dtype} of the shape {pixels.shape}, expected uint8 H×W×3")
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    mean, deviation = cv2.meanStdDev(grey)
    _, rough = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))
    return ImageStatistics(*(float(value[0, 0]) / 255 for value in (mean, deviation, rough)))
