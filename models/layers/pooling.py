"""Pooling by name: (N, C, H, W) → (N, C, H / 2, W / 2), and global pooling → (N, C)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refract.models.layers import pick


class StochasticPool(nn.Module):
    """Draw one value of each window with probability a_i / Σ a_j in training; in evaluation return the mean weighted by this probability.

    Values should be at least 0, as after a ReLU; negative values count as 0. A window of zeros gives 0.
    Source: Zeiler & Fergus 2013, arXiv:1301.3557, equations 4 to 6. Draws from torch's global generator.
    """

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size

    def forward(self, values: Tensor) -> Tensor:
        size, (height, width) = self.size, values.shape[-2:]
        dtype, values = values.dtype, values[..., : height // size * size, : width // size * size].clamp(min=0).float()
        windows = values.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).transpose(-3, -2).flatten(-2)
        total = windows.sum(dim=-1, keepdim=True)
        if not self.training:
            mean = windows.square().sum(dim=-1, keepdim=True) / total.clamp(min=torch.finfo(values.dtype).tiny)
            return mean.squeeze(-1).to(dtype)
        # The drawn index is the first whose cumulative sum exceeds a uniform fraction of the total.
        threshold = torch.rand_like(total) * total
        index = (windows.cumsum(dim=-1) <= threshold).sum(dim=-1, keepdim=True).clamp(max=size * size - 1)
        return windows.gather(-1, index).squeeze(-1).to(dtype)


class GeneralisedMean(nn.Module):
    """(mean of x^p over the image)^(1/p) with a learned p and x clamped to at least 1e-6: p = 1 is the average, p → ∞ the maximum.

    (N, C, H, W) → (N, C). Source: Radenović et al. 2018, arXiv:1711.02512, equation 3.
    """

    def __init__(self, p: float = 3.0) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(float(p)))

    def forward(self, values: Tensor) -> Tensor:
        values = values.float().flatten(2).clamp(min=1e-6)
        largest = values.amax(
            dim=2, keepdim=True
        ).detach()  # without this scaling, a high power of a small number would underflow to 0
        return (values / largest).pow(self.p).mean(dim=2).pow(1 / self.p) * largest.squeeze(2)


class GlobalAverage(nn.Module):
    """(N, C, …) → (N, C), the mean over all positions. Source: Lin et al. 2014, arXiv:1312.4400, section 3.2."""

    def forward(self, values: Tensor) -> Tensor:
        return values.flatten(2).mean(dim=2)


class GlobalMax(nn.Module):
    """(N, C, …) → (N, C), the maximum over all positions."""

    def forward(self, values: Tensor) -> Tensor:
        return values.flatten(2).amax(dim=2)


class _Halved(nn.Module):
    """Pool windows of 2×2, in a stack (N, C, D, H, W) slice by slice. kind: max or average."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, values: Tensor) -> Tensor:
        pool = F.max_pool2d if self.kind == "max" else F.avg_pool2d
        if values.ndim == 4:
            return pool(values, 2)
        slices = values.transpose(1, 2)  # a stack (N, C, D, H, W)
        return pool(slices.flatten(0, 1), 2).unflatten(0, slices.shape[:2]).transpose(1, 2)


def make_pool(name: str) -> nn.Module:
    """Create the pooling `name`, which halves height and width. ValueError for an unknown name."""
    return pick("pool", name, POOLS)()


def make_global_pool(name: str) -> nn.Module:
    """Create the global pooling `name`, (N, C, …) → (N, C). ValueError for an unknown name."""
    return pick("global_pool", name, GLOBAL_POOLS)()


POOLS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {"max": lambda: _Halved("max"), "average": lambda: _Halved("average"), "stochastic": StochasticPool}
)

GLOBAL_POOLS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {"average": GlobalAverage, "max": GlobalMax, "generalised_mean": GeneralisedMean}
)
