"""Optimisers with weight decay on matrices and kernels alone, and learning rate schedules with a linear warm-up."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from refract.models.layers import pick
from refract.models.training.freezing import NORMS, blocks_of
from refract.models.training.sam import SAM

Groups = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """The parameters of optimiser and schedule. ValueError for an unknown name or a number out of range.

    - name: one of OPTIMIZERS
    - lr: the peak learning rate, above 0
    - head_lr, norm_lr: factors on the learning rate of the head and of norm parameters, above 0
    - layer_decay: factor on the learning rate for each block further from the head, in (0, 1] (Clark et al. 2020, arXiv:2003.10555)
    - weight_decay: at least 0, on matrices and kernels alone; decoupled for adamw, lion and muon, else an L2 term in the gradient, as in
      PyTorch
    - momentum: in [0, 1), for sgd, rmsprop and muon; nesterov: for sgd
    - schedule: one of SCHEDULES
    - warmup: fraction of all steps in which the learning rate rises linearly, in [0, 1]
    - lr_end: the lowest learning rate after the warm-up as a fraction of the peak, in [0, 1]; linear, cosine and one_cycle end there
    - sam: the radius ρ of sharpness-aware minimisation; 0 disables it
    - clip_norm, clip_value: limits of the gradient's norm and of each of its values, above 0; None disables clipping
    """

    name: str = "adamw"
    lr: float = 1e-3
    head_lr: float = 1.0
    weight_decay: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    schedule: str = "cosine"
    warmup: float = 0.1
    lr_end: float = 0.0
    norm_lr: float = 1.0
    layer_decay: float = 1.0
    sam: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None

    def __post_init__(self) -> None:
        pick("optimizer", self.name, OPTIMIZERS)
        check_schedule(self.schedule, self.warmup)
        rules = [
            ("lr", math.isfinite(self.lr) and self.lr > 0, "a number above 0"),
            ("head_lr", 0 < self.head_lr < math.inf, "a number above 0"),
            ("weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "a number of at least 0"),
            ("momentum", 0 <= self.momentum < 1, "a number in 0…1, without 1"),
            ("lr_end", 0 <= self.lr_end <= 1, "a fraction in 0…1"),
            ("norm_lr", 0 < self.norm_lr < math.inf, "a number above 0"),
            ("layer_decay", 0 < self.layer_decay <= 1, "a number in 0…1, without 0"),
            ("sam", 0 <= self.sam < math.inf, "a number of at least 0"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "a number above 0, or none"),
            ("clip_value", self.clip_value is None or self.clip_value > 0, "a number above 0, or none"),
        ]
        for key, holds, accepted in rules:
            if not holds:
                raise ValueError(f"{key}={getattr(self, key)!r}: expected {accepted}")

    def make(self, network: nn.Module) -> torch.optim.Optimizer:
        """Build the optimiser for the parameters of `network` that are trainable now."""
        groups = parameter_groups(network, self)
        build = OPTIMIZERS[self.name]
        return SAM(groups, lambda groups: build(groups, self), rho=self.sam) if self.sam else build(groups, self)

    def factor(self, step: int, total_steps: int, head_steps: int = 0) -> float:
        """Compute the factor on `lr` at `step`, counted from 0, of `total_steps`: see `warmup_schedule`.

        head_steps: the number of first steps that train only the head. These steps and the later steps each have a separate warm-up and
        schedule (Howard & Gugger 2020, arXiv:2002.04688, section 2, fastai's `fine_tune`).
        """
        if step < head_steps:
            return warmup_schedule(self.schedule, step, head_steps, self.warmup, self.lr_end)
        rest = max(1, total_steps - head_steps)
        return warmup_schedule(self.schedule, step - head_steps, rest, self.warmup, self.lr_end)


def parameter_groups(network: nn.Module, spec: OptimSpec) -> Groups:
    """Group the trainable parameters by learning rate and weight decay. Matrices and kernels of layers decay, other parameters do not.

    Decay of a norm's scale, a bias, a class token or a position table does not improve generalisation. Parameters in the network's
    `no_weight_decay`, which timm's networks have, do not decay either. Empty groups are excluded. ValueError if nothing is trainable.
    Source: He et al. 2019, arXiv:1812.01187, section 3.1, "no bias decay".
    """
    decayed = decayed_parameter_ids(network)
    norms = {id(p) for m in network.modules() if isinstance(m, NORMS) for p in m.parameters()}
    by_block = spec.layer_decay < 1 or spec.head_lr != 1
    blocks = blocks_of(network) if by_block else [list(network.parameters())]
    groups: Groups = []
    for distance, block in zip(reversed(range(len(blocks))), blocks, strict=True):
        scale = spec.lr * spec.layer_decay**distance
        if not distance:  # the head, or the only block if both factors are 1
            scale *= spec.head_lr
        trainable = [parameter for parameter in block if parameter.requires_grad]
        groups += [
            {"params": [p for p in trainable if id(p) in decayed], "weight_decay": spec.weight_decay, "lr": scale},
            {"params": [p for p in trainable if id(p) not in decayed | norms], "weight_decay": 0.0, "lr": scale},
            {"params": [p for p in trainable if id(p) in norms], "weight_decay": 0.0, "lr": scale * spec.norm_lr},
        ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"{type(network).__name__} has no parameter that requires a gradient; unfreeze at least one")
    return groups


def decayed_parameter_ids(network: nn.Module) -> set[int]:
    """Return the ids of the matrices and kernels of layers: parameters named `weight`, also behind a parametrisation."""
    no_weight_decay = getattr(network, "no_weight_decay", None)
    excluded = set(no_weight_decay()) if callable(no_weight_decay) else set()
    return {
        id(parameter)
        for name, parameter in network.named_parameters()
        if parameter.ndim > 1
        and name not in excluded
        and (name.endswith("weight") or ".parametrizations." in f".{name}")
    }


def warmup_schedule(name: str, step: int, total_steps: int, warmup_fraction: float, end: float = 0.0) -> float:
    """Compute the factor on the learning rate at `step`, counted from 0: a linear warm-up, then the schedule `name`.

    The first round(total_steps · warmup_fraction) steps rise in equal parts to 1 and never use 0. The later steps follow SCHEDULES:
    schedules in ENDING decrease to `end` instead of 0, others stay at or above it. Steps past the end keep the last value.
    ValueError for an unknown name, total_steps below 1 or a warmup_fraction outside 0…1.
    Source: warm-up, Goyal et al. 2017, arXiv:1706.02677, section 2.2.
    """
    check_schedule(name, warmup_fraction)
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps!r}: expected a whole number above 0")
    warmup_steps = round(total_steps * warmup_fraction)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    rest = max(1, total_steps - warmup_steps)
    factor = SCHEDULES[name](min(1.0, (step - warmup_steps) / rest), warmup_steps / rest)
    return end + (1 - end) * factor if name in ENDING else max(factor, end)


def check_schedule(name: str, warmup_fraction: float) -> None:
    """Raise ValueError for an unknown schedule or a warmup_fraction outside 0…1."""
    pick("schedule", name, SCHEDULES)
    if not 0 <= warmup_fraction <= 1:
        raise ValueError(f"warmup={warmup_fraction!r}: expected a fraction of the steps, in 0…1")


def _sgd(groups: Groups, spec: OptimSpec) -> torch.optim.Optimizer:
    nesterov = spec.nesterov and spec.momentum > 0
    return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, nesterov=nesterov)


def _lion(groups: Groups, spec: OptimSpec) -> torch.optim.Optimizer:
    """Build Lion: steps along sign(β₁ m + (1 − β₁) g), with β 0.9 and 0.99. A tenth of adamw's learning rate suits it.

    Source: Chen et al. 2023, arXiv:2302.06675.
    """
    from timm.optim import Lion

    return Lion(groups, lr=spec.lr)


def _muon(groups: Groups, spec: OptimSpec) -> torch.optim.Optimizer:
    """Build Muon: orthogonalised momentum for matrices, and for kernels as matrices; AdamW for other parameters.

    Source: Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982.
    """
    from timm.optim import Muon

    return Muon(groups, lr=spec.lr, momentum=spec.momentum, nesterov=True)


OPTIMIZERS: Mapping[str, Callable[[Groups, OptimSpec], torch.optim.Optimizer]] = MappingProxyType(
    {
        "sgd": _sgd,  # with momentum: Sutskever et al. 2013
        "adagrad": lambda groups, spec: torch.optim.Adagrad(groups, lr=spec.lr),  # Duchi et al. 2011
        "adadelta": lambda groups, spec: torch.optim.Adadelta(groups, lr=spec.lr),  # Zeiler 2012, arXiv:1212.5701
        "rmsprop": lambda groups, spec: torch.optim.RMSprop(
            groups, lr=spec.lr, momentum=spec.momentum
        ),  # Tieleman & Hinton 2012
        "adam": lambda groups, spec: torch.optim.Adam(groups, lr=spec.lr),  # Kingma & Ba 2015, arXiv:1412.6980
        "adamw": lambda groups, spec: torch.optim.AdamW(
            groups, lr=spec.lr
        ),  # Loshchilov & Hutter 2019, arXiv:1711.05101
        "lion": _lion,
        "muon": _muon,
    }
)


def _cosine(progress: float, warmup: float) -> float:
    """Return (1 + cos(π t)) / 2. Source: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, one cycle down to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


def _step(progress: float, warmup: float) -> float:
    """Return 1 before one half of the progress, 0.1 before three quarters, then 0.01.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2.
    """
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


def _inverse_sqrt(progress: float, warmup: float) -> float:
    """Return √(w / t) after a warm-up of w steps. Without a warm-up, w is a tenth of the steps.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 5.3.
    """
    width = warmup or 0.1
    return math.sqrt(width / (width + progress))


def _one_cycle(progress: float, warmup: float) -> float:
    """Fall linearly from 1 to 1/25 in nine tenths of the progress, then to 0. The warm-up is the cycle's rise (0.3 is usual).

    Source: Smith 2018, arXiv:1803.09820, section 4.
    """
    return 1 - progress / 0.9 * 0.96 if progress < 0.9 else 0.4 * (1 - progress)


SCHEDULES: Mapping[str, Callable[[float, float], float]] = MappingProxyType(
    {
        "constant": lambda progress, warmup: 1.0,
        "linear": lambda progress, warmup: 1 - progress,
        "cosine": _cosine,
        "step": _step,
        "inverse_sqrt": _inverse_sqrt,
        "one_cycle": _one_cycle,
    }
)
"""(progress, warmup) → a factor in [0, 1].

progress: the completed fraction of the steps after the warm-up; warmup: the warm-up's length as a fraction of these steps.
"""

ENDING = ("linear", "cosine", "one_cycle")
"""Schedules that end at 0."""
