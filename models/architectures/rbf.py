"""A network of radial basis functions of the distances between an image and learned centres."""

import math

import torch
from torch import Tensor, nn


class RBFNetwork(nn.Module):
    """φ_k(x) = exp(−‖x − c_k‖² / (2 σ²)) on the flattened pixels, then a linear head.

    centres: their number K, at least 2 and at most the number of training images. `prepare` computes them by k-means, and σ = d / √(2 K)
    with the largest distance d between centres. Both stay fixed unless `train_centres` is True.
    Source: Broomhead & Lowe 1988; the width by Haykin 1999, "Neural Networks", section 5.13.
    """

    def __init__(
        self, num_classes: int, *, image_size: tuple[int, int], centres: int = 100, train_centres: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(centres, int) or centres < 2:
            raise ValueError(f"centres={centres!r}: expected a whole number of at least 2")
        self.centres = nn.Parameter(
            torch.randn(centres, 3 * image_size[0] * image_size[1]), requires_grad=train_centres
        )
        self.log_width = nn.Parameter(torch.zeros(()), requires_grad=train_centres)
        self.head = nn.Linear(centres, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) of the `image_size` it was built for → logits (N, num_classes)."""
        squares = torch.cdist(images.flatten(1).float(), self.centres).square()
        return self.head(torch.exp(-squares / (2 * torch.exp(2 * self.log_width))).to(self.head.weight.dtype))

    def prepare(self, images: Tensor) -> None:
        """Compute the centres and σ from normalised training images (N, 3, H, W). ValueError for fewer images than centres."""
        count = len(self.centres)
        if len(images) < count:
            raise ValueError(f"centres={count}: expected at most {len(images)}, the number of training images")
        with torch.no_grad():
            self.centres.copy_(clustered(images.flatten(1), count))
            largest = float(torch.cdist(self.centres, self.centres).max())
            self.log_width.fill_(math.log(max(largest, 1e-6) / math.sqrt(2 * count)))


def clustered(points: Tensor, count: int) -> Tensor:
    """Compute `count` centres of the points (N, D) by k-means, float32 (count, D); the seed comes from torch's global generator."""
    from sklearn.cluster import MiniBatchKMeans

    seed = int(torch.randint(2**31 - 1, ()))
    means = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=1024).fit(points.float().cpu().numpy())
    return torch.from_numpy(means.cluster_centers_).float()
