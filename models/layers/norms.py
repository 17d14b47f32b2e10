"""Normalisation by name, for feature maps (N, C, H, W), stacks (N, C, D, H, W) and vectors (N, C)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from refract.models.layers import pick

GROUPS = 8
"""Groups of a group norm; one group if the number of channels is not a multiple of it."""


class LocalResponse(nn.Module):
    """x_i / (k + α Σ x_j²)^β over the `size` neighbouring channels j of i, as in AlexNet.

    Source: Krizhevsky et al. 2012, section 3.3, with its constants k = 2, n = 5, α = 1e-4, β = 0.75 (PyTorch divides α by n).
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> None:
        super().__init__()
        self.norm = nn.LocalResponseNorm(size, alpha * size, beta, k)

    def forward(self, values: Tensor) -> Tensor:
        return self.norm(values)


class _Standardised(nn.Module):
    """(w − mean) / √(variance + 1e-5) of each filter."""

    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        variance, mean = torch.var_mean(flat, dim=1, correction=0)
        shape = (-1, *([1] * (weight.ndim - 1)))
        return (weight - mean.view(shape)) * torch.rsqrt(variance.view(shape) + 1e-5)


def standardise_weights(layer: nn.Module) -> nn.Module:
    """Standardise the filters of a convolution or linear layer to mean 0 and variance 1 in every forward pass. Returns the layer.

    Source: Qiao et al. 2019, "Weight standardization", arXiv:1903.10520, equation 6.
    """
    parametrize.register_parametrization(layer, "weight", _Standardised())
    return layer


def make_norm(name: str, channels: int, *, dims: int = 2) -> nn.Module:
    """Create the norm `name` for `channels`.

    dims: 0 for vectors (N, C), 2 for (N, C, H, W), 3 for (N, C, D, H, W). ValueError for an unknown name, or a norm that does not apply to
    vectors.
    """
    make = pick("norm", name, NORMS)
    if dims == 0 and name in ("instance", "local_response"):
        raise ValueError(f"norm={name!r} needs feature maps, not vectors; choose another norm")
    return make(channels, dims)


def _batch(channels: int, dims: int) -> nn.Module:
    return {0: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](channels)


def _layer(channels: int, dims: int) -> nn.Module:
    # Statistics over all channels and positions of a sample, with a scale and shift for each channel.
    return nn.LayerNorm(channels) if dims == 0 else nn.GroupNorm(1, channels)


def _group(channels: int, dims: int) -> nn.Module:
    return nn.GroupNorm(GROUPS if channels % GROUPS == 0 else 1, channels)


def _instance(channels: int, dims: int) -> nn.Module:
    return {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims](channels, affine=True)


NORMS: Mapping[str, Callable[[int, int], nn.Module]] = MappingProxyType(
    {
        "none": lambda channels, dims: nn.Identity(),
        "batch": _batch,  # Ioffe & Szegedy 2015, arXiv:1502.03167
        "layer": _layer,  # Ba et al. 2016, arXiv:1607.06450
        "instance": _instance,  # Ulyanov et al. 2016, arXiv:1607.08022
        "group": _group,  # Wu & He 2018, arXiv:1803.08494
        "local_response": lambda channels, dims: LocalResponse(),
        # The paper has a group norm after the standardised convolution. `standardise_weights` standardises the convolution.
        "weight_standardisation": _group,
    }
)
