"""How familiar an image is to a classifier, by the distance of its embedding from those of training images."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from refract.models.folding import WIDEST, folding
from refract.models.training_features import TrainingFeatures

FEWEST = 20
"""Training images from which their distribution is estimated, if there are also two for each class."""

LEAST_VARIANCE = 1e-8
"""Added to each variance of unit vectors."""


def distance_for(labels: Sequence[tuple[int, ...]]) -> str:
    """Return the name of the distance, of DISTANCES, for training images with these labels."""
    return "mahalanobis" if len(labels) >= max(FEWEST, 2 * len(set(labels))) else "nearest"


class Reduced(NamedTuple):
    """How embeddings of `width` features become vectors of at most WIDEST features and of length 1, on one device."""

    width: int
    sums: Tensor
    signs: Tensor

    @classmethod
    def on(cls, device: torch.device, width: int) -> "Reduced":
        sums, signs = folding(width)
        return cls(width, torch.from_numpy(sums).to(device), torch.from_numpy(signs).to(device))

    def __call__(self, embedding: Tensor) -> Tensor:
        """(N, width) → (N, at most WIDEST) float32."""
        rows = embedding.float()
        if self.width > WIDEST:
            rows = rows.new_zeros(len(rows), WIDEST).index_add_(1, self.sums, rows * self.signs)
        return normalize(rows, dim=1)


class Gaussians:
    """One normal distribution for each class, all with one covariance, fitted on unit vectors.

    Each distance is that of Mahalanobis to the nearest mean. Source: Lee et al. 2018, arXiv:1807.03888, section 2.1; Müller & Hein 2025,
    arXiv:2505.18032, on unit vectors. Deviations: folded features, and the covariance is shrunk as in Ledoit & Wolf 2004,
    "A well-conditioned estimator for large-dimensional covariance matrices". Images with the same set of labels form a class.
    """

    def __init__(self, features: Tensor, labels: Sequence[tuple[int, ...]]) -> None:
        """features: (N, D) unit vectors, on the device of the distances; labels: the labels of each row."""
        numbers = {row: number for number, row in enumerate(sorted(set(labels)))}
        classes = torch.tensor([numbers[row] for row in labels], device=features.device)
        rows = features.double()
        sums = rows.new_zeros(len(numbers), rows.shape[1]).index_add_(0, classes, rows)
        means = sums / torch.bincount(classes, minlength=len(numbers))[:, None]
        # (x − m)ᵀ C⁻¹ (x − m) = ‖L⁻¹(x − m)‖² with C = LLᵀ. The mean of all is subtracted first, as large values lose digits.
        lower = torch.linalg.cholesky(shrunk_covariance(rows - means[classes]))
        self._centre = rows.mean(dim=0)
        whitening = torch.linalg.solve_triangular(
            lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
        ).T
        self._means = ((means - self._centre) @ whitening).float()
        self._centre, self._whitening = self._centre.float(), whitening.float().contiguous()

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, D) unit vectors → (N,) distances, float32, at least 0."""
        return torch.cdist((rows - self._centre) @ self._whitening, self._means).amin(dim=1)


def shrunk_covariance(rows: Tensor) -> Tensor:
    """Return the covariance (D, D) of centred rows (N, D), shrunk towards a multiple of the identity by Ledoit and Wolf's estimate."""
    count, width = rows.shape
    covariance = rows.T @ rows / count
    scale = covariance.trace() / width
    spread = (covariance.square().sum() - width * scale**2) / width
    noise = (rows.square().sum(dim=1).square().sum() / count - covariance.square().sum()) / (width * count)
    weight = float((noise / spread).clamp(0, 1)) if spread > 0 else 1.0
    identity = torch.eye(width, dtype=rows.dtype, device=rows.device)
    # Rows that are all equal have no covariance at all; the least scale keeps it invertible.
    return (1 - weight) * covariance + (weight * scale + LEAST_VARIANCE) * identity


class Familiarity:
    """Compares embeddings with a bundle's training features, on one device.

    The distance of an image is that of Mahalanobis, see `Gaussians`, or in older bundles and for few training images 1 - the cosine of its
    embedding to that of the nearest training image. Its familiarity is the fraction of the validation images that are farther away.
    Source of the nearest image: Sun et al. 2022, arXiv:2204.06507. Deviations: the first neighbour instead of the k-th, at most 2,000
    training images, folded features, and a rank among the validation images instead of a threshold.
    """

    def __init__(self, training: TrainingFeatures, device: torch.device) -> None:
        self.training, self.device = training, device
        self._reduced = Reduced.on(device, training.width)
        self._features = torch.from_numpy(training.features.astype(np.float32)).to(device)
        self._validation = torch.from_numpy(training.validation).to(device)
        self._gaussians = Gaussians(self._features, training.labels) if training.distance == "mahalanobis" else None

    def distances(self, embedding: Tensor) -> Tensor:
        """(N, D) embeddings on the device → (N,) distances, float32, at least 0."""
        return self.distances_of(self._reduced(embedding))

    def distances_of(self, reduced: Tensor) -> Tensor:
        """(N, at most WIDEST) results of `Reduced` on the device → (N,) distances, float32, at least 0."""
        if self._gaussians is not None:
            return self._gaussians(reduced)
        return 1 - (reduced @ self._features.T).amax(dim=1)

    def __call__(self, embedding: Tensor) -> Tensor:
        """(N, D) embeddings on the device → (N,) familiarities, float32 in 0…1. NaN without validation images or for other embeddings."""
        if embedding.shape[1] != self.training.width or not len(self._validation):
            return embedding.new_full((len(embedding),), torch.nan, dtype=torch.float32)
        ranks = torch.searchsorted(self._validation, self.distances(embedding), right=True)
        return 1 - ranks.float() / len(self._validation)

    def usual_below(self, limit: float) -> float:
        """Return the expected fraction of usual images with a familiarity below `limit`, 0…1.

        A usual image takes each rank among N validation images with the probability 1/(N + 1).
        """
        count = len(self._validation)
        return math.ceil(limit * count) / (count + 1)

    def nearest(self, embedding: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(N, D) embeddings → (indices of the `count` nearest training images, their cosines), (N, at most count) each, nearest first."""
        cosines = self._reduced(torch.from_numpy(np.ascontiguousarray(embedding)).to(self.device)) @ self._features.T
        best = cosines.topk(min(count, cosines.shape[1]), dim=1)
        return best.indices.cpu().numpy(), best.values.cpu().numpy()
