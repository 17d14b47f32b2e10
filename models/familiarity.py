"""How familiar an image is to a classifier, by the distance of its embedding from those of training images."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from refract.models.folding import WIDEST, folding
from refract.models.training_features import TrainingFeatures

NEIGHBOURS = 1
"""The distance of an image is that to its NEIGHBOURS-th nearest training image."""


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


class Familiarity:
    """Compares embeddings with a bundle's training features, on one device.

    The distance of an image is 1 - the cosine of its embedding to that of the nearest training image. Its familiarity is the fraction of
    the validation images that are farther away. Source: Sun et al. 2022, arXiv:2204.06507. Deviations: the first neighbour instead of the
    k-th, at most 2,000 training images, folded features, and a rank among the validation images instead of a threshold.
    """

    def __init__(self, training: TrainingFeatures, device: torch.device) -> None:
        self.training, self.device = training, device
        self._reduced = Reduced.on(device, training.width)
        self._features = torch.from_numpy(training.features.astype(np.float32)).to(device)
        self._validation = torch.from_numpy(training.validation).to(device)

    def distances(self, embedding: Tensor) -> Tensor:
        """(N, D) embeddings on the device → (N,) distances, float32 in 0…2."""
        return self.distances_of(self._reduced(embedding))

    def distances_of(self, reduced: Tensor) -> Tensor:
        """(N, at most WIDEST) results of `Reduced` on the device → (N,) distances, float32 in 0…2."""
        cosines = reduced @ self._features.T
        if NEIGHBOURS == 1:
            return 1 - cosines.amax(dim=1)
        return 1 - cosines.topk(min(NEIGHBOURS, cosines.shape[1]), dim=1, sorted=True).values[:, -1]

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
