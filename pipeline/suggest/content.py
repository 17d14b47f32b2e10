"""Classify the images of a data set for the choice of augmentation: grey or colour, glyphs or scenes, and whether a flip keeps the class.

The input are thumbnails, the output plain values. Independent of files, configs and networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import cv2
import numpy as np

SIDE = 32
"""Side of a thumbnail in pixels."""

GREY_TOLERANCE = 10
"""Largest difference between channels of a grey image after JPEG's chroma coding, of 255."""

FEWEST_FLIPPED = 10
"""Minimum number of images per class in the flip test."""


@dataclass(frozen=True)
class Content:
    """Properties of the images.

    grey: nearly all images are grey; glyphs: nearly all images are strokes on a plain ground; swapped: two classes that a horizontal flip
    swaps, or None; decoded: number of images that were examined.
    """

    grey: bool
    glyphs: bool
    swapped: tuple[str, str] | None
    decoded: int


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Squash an image to SIDE×SIDE. pixels: uint8 H×W×3, RGB. Returns uint8 SIDE×SIDE×3."""
    return cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def content_of(thumbnails: Sequence[np.ndarray], labels: Sequence[str]) -> Content:
    """Return the properties of the thumbnails, uint8 SIDE×SIDE×3 each, RGB. labels: label of each, "" for none or several."""
    if not thumbnails:
        return Content(grey=False, glyphs=False, swapped=None, decoded=0)
    images = np.stack(thumbnails)
    grey = float(np.mean([is_grey(image) for image in images])) >= 0.95
    luma = images.astype(np.float32).mean(axis=3)
    glyphs = grey and float(np.mean([is_glyph(image) for image in luma])) >= 0.8
    return Content(grey, glyphs, swapped_by_flip(luma, labels), len(images))


def is_grey(image: np.ndarray) -> bool:
    """Return whether the channels are equal up to JPEG noise in 99 % of the pixels. image: uint8 H×W×3."""
    values = image.astype(np.int16)
    spread = values.max(axis=2) - values.min(axis=2)
    return bool(np.percentile(spread, 99) <= GREY_TOLERANCE)


def is_glyph(luma: np.ndarray) -> bool:
    """Return whether the image has a plain ground and a stroke that covers less area. luma: float H×W, 0…255.

    The ground is the most common grey level, and has a third of the pixels within 12 levels; Otsu's threshold (Otsu 1979, "A
    threshold selection method from gray-level histograms") explains 70 % of the variance, and the ground's side of it is the larger.
    """
    values = luma.ravel()
    counts = np.bincount(values.astype(np.uint8), minlength=256)
    near = np.convolve(counts, np.ones(25), mode="same")
    ground = int(near.argmax())
    separability, threshold = _otsu(counts)
    same_side = float(np.mean((values > threshold) == (ground > threshold)))
    return near[ground] >= len(values) / 3 and separability >= 0.7 and same_side > 0.5


def _otsu(counts: np.ndarray) -> tuple[float, int]:
    """Return (fraction of the variance between the two sides, threshold) for a histogram of 256 grey levels."""
    density = counts / counts.sum()
    levels = np.arange(256)
    below, mass = np.cumsum(density), np.cumsum(density * levels)
    total = float(((levels - mass[-1]) ** 2 * density).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.nan_to_num((mass[-1] * below - mass) ** 2 / (below * (1 - below)))
    best = int(between.argmax())
    return (float(between[best]) / total if total > 0 else 0.0), best


def swapped_by_flip(luma: np.ndarray, labels: Sequence[str]) -> tuple[str, str] | None:
    """Return two classes that a horizontal flip swaps, such as left and right arrows, or None.

    The classifier is the nearest class mean on thumbnails; an image is compared with means that exclude it. luma: float (N, H, W); labels:
    label of each image. Only classes with FEWEST_FLIPPED images or more are compared. Without a flip, at least 60 % of the images of both
    classes must be nearest to the mean of their class; flipped, at least 60 % must be nearest to the mean of the other class.
    """
    names = [name for name in sorted(set(labels)) if name and list(labels).count(name) >= FEWEST_FLIPPED]
    if len(names) < 2:
        return None
    index = {name: i for i, name in enumerate(names)}
    selected = np.array([label in index for label in labels])
    truth = np.array([index[label] for label in labels if label in index])
    images = _standardised(luma[selected])
    plain = _nearest(images, images, truth, len(names))
    flipped = _nearest(images, _standardised(luma[selected][:, :, ::-1]), truth, len(names))
    scores = {
        (a, b): min(plain[a, a], plain[b, b], flipped[a, b], flipped[b, a])
        for a, b in combinations(range(len(names)), 2)
    }
    a, b = max(scores, key=scores.__getitem__)
    return (names[a], names[b]) if scores[a, b] >= 0.6 else None


def _standardised(luma: np.ndarray) -> np.ndarray:
    """Return rows of 16×16 pixels, normalised for brightness and contrast, which are independent of left and right."""
    rows = np.stack([cv2.resize(np.ascontiguousarray(image), (16, 16), interpolation=cv2.INTER_AREA) for image in luma])
    rows = rows.reshape(len(rows), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(rows.std(axis=1, keepdims=True), 1e-6)


def _nearest(references: np.ndarray, images: np.ndarray, truth: np.ndarray, count: int) -> np.ndarray:
    """Return the matrix (class, class): fraction of the first class's images that are nearest to the mean of the second.

    An image does not contribute to the mean of its class that it is compared with.
    """
    sums = np.stack([references[truth == k].sum(axis=0) for k in range(count)])
    sizes = np.bincount(truth, minlength=count)
    distances = np.empty((len(images), count))
    for k in range(count):
        in_class = (truth == k)[:, None]
        means = np.where(in_class, (sums[k] - references) / (sizes[k] - 1), sums[k] / sizes[k])
        distances[:, k] = ((images - means) ** 2).sum(axis=1)
    nearest = distances.argmin(axis=1)
    return np.stack([np.bincount(nearest[truth == k], minlength=count) / sizes[k] for k in range(count)])
