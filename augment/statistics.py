"""Statistics of training images for zero-centring them: channel means and deviations, the mean image, whitening. One pass, streaming.

For the classifier's first layer (`refract.models.classifier`); knows nothing of networks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["channel", "mean_image", "pca", "zca"]
KINDS: tuple[Kind, ...] = ("channel", "mean_image", "pca", "zca")

LARGEST_WHITENED = 4096
"""Values of an image (height · width · 3) up to which it is whitened: the matrix has the square of that."""

EPSILON = 1e-2
"""Added to each variance in whitening, of values in 0…1: without it the faintest directions, which are noise, would be blown up."""


@dataclass(frozen=True)
class Statistics:
    """mean, std: (3,) float64 of RGB in 0…1. mean_image: (3, H, W) float32 in 0…1, but for `channel`. whitening: (D, D) float32 for `pca`
    and `zca`, D = 3·H·W in that order: whitened = whitening @ (image − mean_image)."""

    mean: np.ndarray
    std: np.ndarray
    mean_image: np.ndarray | None = None
    whitening: np.ndarray | None = None


def measure(images: Iterable[np.ndarray], kind: Kind, *, chunk: int = 256) -> Statistics:
    """Statistics of uint8 H×W×3 images of one size, kept as sums only. ValueError for none, for several sizes, or too large to whiten.

    pca: rotates to the principal components and divides each by its deviation; zca: and rotates back, so that an image stays one.
    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images", appendix A (ZCA); a constant channel's std is 1.
    """
    count, shape = 0, None
    total = squares = products = None
    for batch in _chunks(images, chunk):
        pixels = batch.reshape(len(batch), -1, 3).transpose(0, 2, 1).reshape(len(batch), -1).astype(np.float64) / 255
        if shape is None:
            shape = batch.shape[1:3]
            total, squares = np.zeros(pixels.shape[1]), np.zeros(pixels.shape[1])
            if kind in ("pca", "zca"):
                if pixels.shape[1] > LARGEST_WHITENED:
                    raise ValueError(
                        f"{kind} whitening is for small images: {shape[0]}×{shape[1]}×3 = {pixels.shape[1]} values, "
                        f"at most {LARGEST_WHITENED}"
                    )
                products = np.zeros((pixels.shape[1],) * 2)
        if batch.shape[1:3] != shape:
            raise ValueError(f"images of several sizes: {shape[0]}×{shape[1]} and {batch.shape[1]}×{batch.shape[2]}")
        count += len(pixels)
        total += pixels.sum(0)
        squares += (pixels**2).sum(0)
        if products is not None:
            products += pixels.T @ pixels
    if count == 0 or shape is None or total is None or squares is None:
        raise ValueError("no images to take statistics of")
    centre = total / count
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
    held: list[np.ndarray] = []
    for image in images:
        if held and (len(held) == size or image.shape != held[0].shape):
            yield np.stack(held)
            held = []
        held.append(image)
    if held:
        yield np.stack(held)
