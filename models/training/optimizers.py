"""The optimisers by name. Importing this module imports no PyTorch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from refract.models.training.specs import OptimSpec

Groups = list[dict[str, Any]]
"""Parameter groups in PyTorch's form, each with `params`, `lr` and `weight_decay`."""


@dataclass(frozen=True)
class Optimizer:
    """An optimiser.

    make: (parameter groups, the spec) → the optimiser; times_adamw: its learning rate as a multiple of AdamW's, the ratio of the usual
    values in libraries and papers.
    """

    make: "Callable[[Groups, OptimSpec], torch.optim.Optimizer]"
    times_adamw: float


def _sgd(groups: Groups, spec: "OptimSpec") -> "torch.optim.Optimizer":
    """Build SGD with momentum. Source: Sutskever et al. 2013."""
    from torch.optim import SGD

    nesterov = spec.nesterov and spec.momentum > 0
    return SGD(groups, lr=spec.peak_lr, momentum=spec.momentum, nesterov=nesterov)


def _adagrad(groups: Groups, spec: "OptimSpec") -> "torch.optim.Optimizer":
    """Build Adagrad. Source: Duchi et al. 2011."""
    from torch.optim import Adagrad

    return Adagrad(groups, lr=spec.peak_lr)


def _adadelta(groups: Groups, spec: "OptimSpec") -> "torch.optim.Optimizer":
    """Build Adadelta. Source: Zeiler 2012, arXiv:1212.5701."""
    from torch.optim import Adadelta

    return Adadelta(groups, lr=spec.peak_lr)


def _rmsprop(groups: Groups, spec: "OptimSpec") -> "torch.optim.Optimizer":
    """Build RMSprop. Source: Tieleman & Hinton 2012."""
    from torch.optim import RMSprop

    return RMSprop(groups, lr=spec.peak_lr, momentum=spec.momentum)


def _adam(groups: Groups, spec: "OptimSpec") -> "torch.optim.Optimizer":
    """Build Adam. Source: Kingma & Ba 2015, arXiv:1412.6980."""
    from torch.optim import Adam

    return Adam(groups, lr=spec.peak_lr)


def _adamw(groups: Groups, spec: "OptimSpec") -> "torch.optim.Optimizer":
    """Build AdamW. Source: Loshchilov & Hutter 2019, arXiv:1711.05101."""
    from torch.optim import AdamW

    return AdamW(groups, lr=spec.peak_lr)


def _lion(groups: Groups, spec: "OptimSpec") -> "torch.optim.Optimizer":
    """Build Lion: steps along sign(β₁ m + (1 − β₁) g), with β 0.9 and 0.99.

    Source: Chen et al. 2023, arXiv:2302.06675.
    """
    from timm.optim import Lion

    return Lion(groups, lr=spec.peak_lr)


def _muon(groups: Groups, spec: "OptimSpec") -> "torch.optim.Optimizer":
    """Build Muon: orthogonalised momentum for matrices, and for kernels as matrices; AdamW for other parameters.

    Source: Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982.
    """
    from timm.optim import Muon

    return Muon(groups, lr=spec.peak_lr, momentum=spec.momentum, nesterov=True)


OPTIMIZERS: Mapping[str, Optimizer] = MappingProxyType(
    {
        "sgd": Optimizer(_sgd, times_adamw=25.0),
        "adagrad": Optimizer(_adagrad, times_adamw=5.0),
        "adadelta": Optimizer(_adadelta, times_adamw=500.0),
        "rmsprop": Optimizer(_rmsprop, times_adamw=0.5),
        "adam": Optimizer(_adam, times_adamw=1.0),
        "adamw": Optimizer(_adamw, times_adamw=1.0),
        "lion": Optimizer(_lion, times_adamw=0.1),
        "muon": Optimizer(_muon, times_adamw=10.0),
    }
)
