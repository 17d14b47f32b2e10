"""A network of radial basis functions: how near an image is to each of a few centres."""

import math

import torch
from torch import Tensor, nn


class RBFNetwork(nn.Module):
    """φ_k(x) = exp(−‖x − c_k‖² / (2 σ²)) on the flattened pixels, then a linear head.

    centres: how many, at most as there are images. `prepare` puts them where k-means finds clusters, and σ = d / √(2 K), d the largest
    distance between centres; both stay fixed unless `train_centres`.
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
        """Find the centres among normalised training images (N, 3, H, W). ValueError for fewer images than centres."""
        count = len(self.centres)
        if len(images) < count:
            raise ValueError(f"centres={count}: there are only {len(images)} training images to cluster")
        with torch.no_grad():
            self.centres.copy_(clustered(images.flatten(1), count))
            largest = float(torch.cdist(self.centres, self.centres).max())
            self.log_width.fill_(math.log(max(largest, 1e-6) / math.sqrt(2 * count)))


def clustered(points: Tensor, count: int) -> Tensor:
    """`count` centres of the points (N, D) by k-means, float32 (count, D); seeded by torch's global generator."""
    from sklearn.cluster import MiniBatchKMeans

    seed = int(torch.randint(2**31 - 1, ()))
    means = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=1024).fit(points.float().cpu().numpy())
    return torch.from_numpy(means.cluster_centers_).float()
