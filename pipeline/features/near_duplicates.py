"""Find near-duplicates by their embeddings: crops, flips, rotations and new encodings of one photo, which a hash of the layout misses.

The nearest training images by cosine similarity are candidates. Two photos of one class may be as similar as a photo and its crop, so
each candidate is aligned with the image, and their details are compared.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refract.augment import Preprocess
from refract.cores import cores
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.data.near_duplicates import difference_hash
from refract.progress import Progress

if TYPE_CHECKING:
    from refract.pipeline.features.training import EmbeddedFit

log = logging.getLogger(__name__)

CANDIDATES, LEAST_COSINE = 3, 0.7
"""Training images that are compared with an image, and their least cosine similarity to it."""

SIDE, DETAIL, ALIKE = 64, 6.0, 0.8
"""Candidates are aligned as grey images of SIDE×SIDE pixels. Structures of more than about DETAIL pixels are removed, as many photos share
them. Near-duplicates have a correlation of at least ALIKE. On ants and bees it is 0.83 or more for planted near-duplicates and 0.41 or less
for different photos, see `benchmarks.features`, stage planted."""

FARTHEST, CONTROLS, UNLIKE = 23, 3, 1 / 3
"""All images of a fixed camera correlate, and so do X-rays of one kind. An image is therefore also compared with the CONTROLS last of its
FARTHEST nearest training images. Its difference from a near-duplicate, 1 − correlation, is at most UNLIKE of that from each control."""

OVERLAP, SCALE = 0.5, 1.6
"""The aligned images must overlap in this fraction of the pixels, and the alignment may stretch by SCALE."""

ROWS, COLUMNS = 1024, 65_536
"""Images, and training images, whose similarities are computed at once, which bounds the memory."""

STEPS = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 50, 1e-4)
"""The alignment's largest number of steps, and the gain at which it stops."""

EVERYWHERE, BLUR = np.ones((SIDE, SIDE), np.uint8), 5
"""The alignment uses all pixels, after a Gaussian blur of this many pixels."""


def with_near_duplicates(manifest: Manifest, fit: "EmbeddedFit", test: np.ndarray) -> Manifest:
    """Add the near-duplicates of training images in `val` and `test`, found by embeddings, to `near`.

    fit: the embeddings of the manifest's training and validation samples; test: embeddings of its test samples, (N, D). OSError if an image
    is no longer readable.
    """
    vectors, count = fit.store.vectors(fit.keys), len(manifest.of("train"))
    measured, train = [*manifest.of("val"), *manifest.of("test")], manifest.of("train")
    pairs = similar_pairs(
        measured, np.concatenate([vectors[count:], test]), train, vectors[:count], torch.device(fit.device)
    )
    known = {path for path, _ in manifest.near}
    added = [(measured[i].path, train[j].path) for i, j in pairs if measured[i].path not in known]
    if added:
        log.warning(
            "data: %d further images of val and test resemble training images by their embeddings, such as %s and %s; "
            "their metrics may be too high",
            len(added),
            *added[0],
        )
    return replace(manifest, near=(*manifest.near, *added))


def similar_pairs(
    measured: Sequence[Sample],
    vectors: np.ndarray,
    train: Sequence[Sample],
    train_vectors: np.ndarray,
    device: torch.device,
) -> list[tuple[int, int]]:
    """Return (index in `measured`, index in `train`) of near-duplicates, the most similar one for each measured sample.

    vectors, train_vectors: embeddings float32 (N, D) and (M, D), M > 0. OSError if an image is no longer readable.
    """
    pairs = []
    with ThreadPoolExecutor(cores()) as pool, Progress("comparing near-duplicates", len(measured)) as progress:
        for start in range(0, len(measured), ROWS):
            rows = torch.from_numpy(vectors[start : start + ROWS]).to(device)
            images = measured[start : start + ROWS]
            for row, match in enumerate(_matches(images, _neighbours(rows, train_vectors), train, pool)):
                if match is not None:
                    pairs.append((start + row, match))
            progress.update(start + len(rows))
    return pairs


class _Neighbours(NamedTuple):
    """Indices of training images. candidates: the nearest ones; controls: farther ones."""

    candidates: list[int]
    controls: list[int]


def _neighbours(rows: Tensor, train: np.ndarray) -> Iterator[_Neighbours]:
    rows = F.normalize(rows, dim=1)
    best, indices = rows.new_zeros(len(rows), 0), torch.zeros(len(rows), 0, dtype=torch.long, device=rows.device)
    for start in range(0, len(train), COLUMNS):
        block = F.normalize(torch.from_numpy(train[start : start + COLUMNS]).to(rows.device), dim=1)
        cosines, places = (rows @ block.T).topk(min(FARTHEST, len(block)), dim=1)  # few, before the indices take memory
        cosines, indices = torch.cat([best, cosines], dim=1), torch.cat([indices, start + places], dim=1)
        best, order = cosines.topk(min(FARTHEST, cosines.shape[1]), dim=1)
        indices = indices.gather(1, order)
    for columns, cosines in zip(indices.tolist(), (best >= LEAST_COSINE).sum(dim=1).tolist(), strict=True):
        yield _Neighbours(columns[: min(cosines, CANDIDATES)], columns[CANDIDATES:][-CONTROLS:])


def _matches(
    images: Sequence[Sample], neighbours: Iterable[_Neighbours], train: Sequence[Sample], pool: ThreadPoolExecutor
) -> Iterator[int | None]:
    """Yield, for each image, the index in `train` of the first candidate that shows the same photo, None if there is none."""
    neighbours = list(neighbours)
    compared = [(image, near) for image, near in zip(images, neighbours, strict=True) if near.candidates]
    wanted = {
        sample.path: sample for image, near in compared for sample in (image, *(train[j] for j in near.candidates))
    }
    thumbnails = dict(zip(wanted, pool.map(thumbnail, wanted.values()), strict=True))

    def match(image: Sample, near: _Neighbours) -> int | None:
        if (first := thumbnails.get(image.path)) is None:
            return None
        for j in near.candidates:
            second = thumbnails[train[j].path]
            alike = -1.0 if second is None else correlation(first, second)
            if alike >= ALIKE and 1 - alike <= UNLIKE * (1 - _control(first, [train[k] for k in near.controls])):
                return j
        return None

    return pool.map(match, images, neighbours)


def _control(image: np.ndarray, others: Sequence[Sample]) -> float:
    """Return the largest correlation with the controls, 0 without a positive one."""
    thumbnails = (thumbnail(other) for other in others)
    return max([0.0, *(correlation(image, other) for other in thumbnails if other is not None)])


def correlation(image: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation of the details of two thumbnails, the second of which is aligned with the first, also after a flip.

    The alignment is affine, by ECC: Evangelidis & Psarakis 2008, "Parametric image alignment using enhanced correlation coefficient
    maximization". Returns -1 where it fails.
    """
    return max(_aligned_correlation(image, view) for view in (other, np.ascontiguousarray(other[:, ::-1])))


def _aligned_correlation(image: np.ndarray, other: np.ndarray) -> float:
    warp = np.eye(2, 3, dtype=np.float32)
    try:
        cv2.findTransformECC(image, other, warp, cv2.MOTION_AFFINE, STEPS, EVERYWHERE, BLUR)
    except cv2.error:  # no alignment, or an image without structure
        return -1.0
    if not np.isfinite(warp).all():
        return -1.0
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    inside = cv2.warpAffine(np.ones_like(other), warp, (SIDE, SIDE), flags=flags) > 0.99
    smallest, largest = np.linalg.svd(warp[:, :2], compute_uv=False)[::-1]
    if inside.mean() < OVERLAP or smallest < 1 / SCALE or largest > SCALE:
        return -1.0
    details = [_details(pixels)[inside] for pixels in (image, cv2.warpAffine(other, warp, (SIDE, SIDE), flags=flags))]
    first, second = (values - values.mean() for values in details)
    return float((first @ second) / max(float(np.linalg.norm(first) * np.linalg.norm(second)), 1e-6))


def _details(pixels: np.ndarray) -> np.ndarray:
    return pixels - cv2.GaussianBlur(pixels, (0, 0), DETAIL)


def thumbnail(sample: Sample) -> np.ndarray | None:
    """Return the grey image, float32 SIDE×SIDE, None for an image with too little structure, see `difference_hash`."""
    pixels = _shrink(sample.read())
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32) if difference_hash(pixels) else None


_shrink = Preprocess(SIDE, SIDE, resize="squash")
