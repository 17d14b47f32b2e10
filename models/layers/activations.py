"""Activations by name. They work element by element on floats of any shape, except Maxout, which joins channels."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from refract.models.layers import pick


class _StepFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        return (values >= 0).to(values.dtype)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


class Step(nn.Module):
    """1 where x ≥ 0, else 0: the threshold unit. Its gradient is 0 everywhere, so earlier layers do not learn by back-propagation.

    Source: Rosenblatt 1958, "The perceptron".
    """

    def forward(self, values: Tensor) -> Tensor:
        return _StepFunction.apply(values)


class Sigmoid(nn.Module):
    """1 / (1 + exp(−slope · x)). slope: above 0; a large slope approximates a step."""

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        if not slope > 0:
            raise ValueError(f"slope={slope!r}: expected a number above 0")
        self.slope = slope

    def forward(self, values: Tensor) -> Tensor:
        return torch.sigmoid(self.slope * values)


class Maxout(nn.Module):
    """The largest of `pieces` neighbouring channels: (N, pieces · C, …) → (N, C, …).

    The layer before it must have `pieces` times the channels. Source: Goodfellow et al. 2013, arXiv:1302.4389, equation 1.
    """

    def __init__(self, pieces: int = 2) -> None:
        super().__init__()
        if pieces < 2:
            raise ValueError(f"pieces={pieces!r}: expected a whole number of at least 2")
        self.pieces = pieces

    def forward(self, values: Tensor) -> Tensor:
        """Return the maximum of each group of channels. ValueError if the number of channels is not a multiple of `pieces`."""
        if values.shape[1] % self.pieces:
            raise ValueError(f"maxout got {values.shape[1]} channels: expected a multiple of pieces={self.pieces}")
        return values.unflatten(1, (-1, self.pieces)).amax(dim=2)


def make_activation(name: str, **args: float) -> nn.Module:
    """Create the activation `name`. ValueError for an unknown name or an argument that it does not accept."""
    try:
        return pick("activation", name, ACTIVATIONS)(**args)
    except TypeError as err:
        raise ValueError(f"activation {name!r} rejects its arguments {args}: {err}") from err


def pieces_of(name: str, args: Mapping[str, float]) -> int:
    """Return the number of channels that the activation joins to one: 1 except for maxout."""
    return int(args.get("pieces", 2)) if name == "maxout" else 1


ACTIVATIONS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "step": Step,
        "sigmoid": Sigmoid,
        "tanh": nn.Tanh,
        "relu": nn.ReLU,
        "leaky_relu": nn.LeakyReLU,  # x, or negative_slope · x below 0 (Maas et al. 2013)
        "prelu": nn.PReLU,  # leaky_relu with a learned slope (He et al. 2015, arXiv:1502.01852, section 2.1)
        "elu": nn.ELU,  # x, or alpha (exp x − 1) below 0 (Clevert et al. 2016, arXiv:1511.07289)
        "maxout": Maxout,
        "silu": nn.SiLU,  # x σ(x), also called swish (Ramachandran et al. 2017, arXiv:1710.05941)
        "gelu": nn.GELU,  # x Φ(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415)
        "mish": nn.Mish,  # x tanh(ln(1 + exp x)) (Misra 2020, arXiv:1908.08681)
        "identity": nn.Identity,
    }
)
