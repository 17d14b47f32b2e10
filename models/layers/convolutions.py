"""Convolutions by name: each maps (N, in, H, W) → (N, out, H, W) with a square kernel of odd side and zero padding."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from refract.models.layers import pick

GROUPS = 4


class ChannelShuffle(nn.Module):
    """Interleave the channels of `groups` groups, so that each group of the next convolution reads channels of all groups.

    Source: Zhang et al. 2018, "ShuffleNet", arXiv:1707.01083, section 3.1.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


def make_conv(name: str, inputs: int, outputs: int, *, kernel: int = 3, bias: bool = False) -> nn.Module:
    """Create the convolution `name`. kernel: odd, in pixels. ValueError for an unknown name or an even kernel."""
    make = pick("conv", name, CONVS)
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel!r}: expected an odd number of pixels above 0")
    return make(inputs, outputs, kernel, bias)


def _plain(inputs: int, outputs: int, kernel: int, bias: bool) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)


def _pointwise(inputs: int, outputs: int, kernel: int, bias: bool) -> nn.Module:
    """1×1: mixes only channels and ignores `kernel`."""
    return nn.Conv2d(inputs, outputs, 1, bias=bias)


def _volume(inputs: int, outputs: int, kernel: int, bias: bool) -> nn.Module:
    """3-D, on stacks of slices (N, in, D, H, W)."""
    return nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)


def _transposed(inputs: int, outputs: int, kernel: int, bias: bool) -> nn.Module:
    """The transpose of a plain convolution of stride 1. (Zeiler et al. 2010, "Deconvolutional networks".)"""
    return nn.ConvTranspose2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)


def _dilated(inputs: int, outputs: int, kernel: int, bias: bool) -> nn.Module:
    """Dilation 2: the kernel reads every second pixel. (Yu & Koltun 2016, arXiv:1511.07122.)"""
    return nn.Conv2d(inputs, outputs, kernel, padding=2 * (kernel // 2), dilation=2, bias=bias)


def _spatially_separable(inputs: int, outputs: int, kernel: int, bias: bool) -> nn.Module:
    """A k×1 kernel, then a 1×k kernel: 2k weights for two channels instead of k². (Szegedy et al. 2016, arXiv:1512.00567, section 3.2.)"""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, (kernel, 1), padding=(kernel // 2, 0), bias=False),
        nn.Conv2d(outputs, outputs, (1, kernel), padding=(0, kernel // 2), bias=bias),
    )


def _depthwise_separable(inputs: int, outputs: int, kernel: int, bias: bool) -> nn.Module:
    """A kernel for each channel, then 1×1 across the channels. (Howard et al. 2017, "MobileNets", arXiv:1704.04861, section 3.1.)"""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, kernel, padding=kernel // 2, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=bias),
    )


def _grouped(inputs: int, outputs: int, kernel: int, bias: bool) -> nn.Module:
    """Four groups; one group if a number of channels is not a multiple of four. (Krizhevsky et al. 2012; Xie et al. 2017.)"""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=_groups(inputs, outputs), bias=bias)


def _shuffled(inputs: int, outputs: int, kernel: int, bias: bool) -> nn.Module:
    """A grouped convolution, then a shuffle of the channels across the groups."""
    return nn.Sequential(_grouped(inputs, outputs, kernel, bias), ChannelShuffle(_groups(inputs, outputs)))


def _groups(inputs: int, outputs: int) -> int:
    return GROUPS if inputs % GROUPS == outputs % GROUPS == 0 else 1


CONVS: Mapping[str, Callable[[int, int, int, bool], nn.Module]] = MappingProxyType(
    {
        "plain": _plain,
        "pointwise": _pointwise,
        "3d": _volume,
        "transposed": _transposed,
        "dilated": _dilated,
        "spatially_separable": _spatially_separable,
        "depthwise_separable": _depthwise_separable,
        "grouped": _grouped,
        "shuffled": _shuffled,
    }
)
