"""Statistics of training images for normalisation: channel means and deviations, mean image, whitening. Streams the images once.

The classifier's first layer applies them (`refract.models.classifier`). Independent of networks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["channel", "mean_image", "pca", "zca"]
KINDS: tuple[Kind, ...] = ("channel", "mean_image", "pca", "zca")

LARGEST_WHITENED = 4096
"""Most values of an image (height · width · 3) for whitening. The matrix has the square of this number of entries."""

EPSILON = 1e-2
"""Added to each variance in whitening, for values in 0…1. Without it, whitening would amplify the directions of noise."""


@dataclass(frozen=True)
class Statistics:
    """Normalisation statistics of a set of images.

    mean, std: float64 (3,), of RGB in 0…1.
    mean_image: float32 (3, H, W) in 0…1; None for `channel`.
    whitening: float32 (D, D), D = 3·H·W in that order, for `pca` and `zca`: whitened = whitening @ (image − mean_image).
    """

    mean: np.ndarray
    std: np.ndarray
    mean_image: np.ndarray | None = None
    whitening: np.ndarray | None = None


def measure(images: Iterable[np.ndarray], kind: Kind, *, chunk: int = 256) -> Statistics:
    """Measure uint8 H×W×3 images of one size. Keeps sums only. A constant channel's std is 1.

    kind: `pca` rotates to the principal components and divides each by its deviation; `zca` also rotates back, to pixels.
    chunk: images that are summed at once.
    ValueError for no images, for several sizes, or for images too large to whiten.
    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images", appendix A (ZCA).
    """
    count, shape = 0, None
    sums = squares = products = None
    for batch in _chunks(images, chunk):
        pixels = batch.reshape(len(batch), -1, 3).transpose(0, 2, 1).reshape(len(batch), -1).astype(np.float64) / 255
        if shape is None:
            shape = batch.shape[1:3]
            sums, squares = np.zeros(pixels.shape[1]), np.zeros(pixels.shape[1])
            if kind in ("pca", "zca"):
                if pixels.shape[1] > LARGEST_WHITENED:
                    raise ValueError(
                        f"{kind} whitening is for small images of at most {LARGEST_WHITENED} values: "
                        f"got {shape[0]}×{shape[1]}×3 = {pixels.shape[1]}"
                    )
                products = np.zeros((pixels.shape[1],) * 2)
        if batch.shape[1:3] != shape:
            raise ValueError(f"images have several sizes: {shape[0]}×{shape[1]} and {batch.shape[1]}×{batch.shape[2]}")
        count += len(pixels)
        sums += pixels.sum(0)
        squares += (pixels**2).sum(0)
        if products is not None:
            products += pixels.T @ pixels
    if count == 0 or shape is None or sums is None or squares is None:
        raise ValueError("no images to measure")
    centre = sums / count
    mean = centre.reshape(3, -1).mean(1)
    variance = (squares / count).reshape(3, -1).mean(1) - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    std[std < 1e-6] = 1.0
    image = None if kind == "channel" else centre.reshape(3, *shape).astype(np.float32)
    whitening = None
    if products is not None:
        values, vectors = np.linalg.eigh(products / count - np.outer(centre, centre))
        scaled = (vectors / np.sqrt(np.maximum(values, 0) + EPSILON)).T
        whitening = (scaled if kind == "pca" else vectors @ scaled).astype(np.float32)
    return Statistics(mean, std, image, whitening)


def _chunks(images: Iterable[np.ndarray], size: int) -> Iterable[np.ndarray]:
    stacked: list[np.ndarray] = []
    for image in images:
        if stacked and (len(stacked) == size or image.shape != stacked[0].shape):
            yield np.stack(stacked)
            stacked = []
        stacked.append(image)
    if stacked:
        yield np.stack(stacked)
