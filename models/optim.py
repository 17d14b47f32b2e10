"""Optimisers that leave norms and biases undecayed, and a learning rate that warms up and then follows a schedule."""

import difflib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: matrices and kernels with `weight_decay`, the rest (ndim ≤ 1) without.

    Decay on a norm's scale or a bias regularises nothing that generalises. A group without parameters is left out.
    ValueError for a negative weight_decay, or where nothing is trainable.
    Source: He et al. 2019, arXiv:1812.01187, section 3.1, "no bias decay".
    """
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay={weight_decay!r}: expected a number of at least 0")
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(module).__name__} has no parameter that requires a gradient: there is nothing to train"
        )
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    name: str, module: nn.Module, *, lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """The optimiser `name` of OPTIMIZERS over `parameter_groups`.

    lr: above 0; momentum: in 0…1 without 1, for sgd (Nesterov's where above 0); adamw keeps its betas 0.9 and 0.999.
    ValueError for an unknown name or a number out of range.
    """
    _check_known("optimizer", name, OPTIMIZERS)
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr={lr!r}: expected a number above 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r}: expected a number in 0…1, without 1")
    return OPTIMIZERS[name](parameter_groups(module, weight_decay), lr, momentum)


def warmup_schedule(name: str, step: int, total_steps: int, warmup_fraction: float) -> float:
    """The factor on the learning rate at `step`, counted from 0: a linear warm-up, then the schedule `name`.

    The first round(total_steps · warmup_fraction) steps rise in equal parts to 1 and never use 0; the rest follow
    SCHEDULES. Steps past the end keep the last value. ValueError for an unknown name, total_steps below 1 or a
    warmup_fraction outside 0…1. Source: warm-up, Goyal et al. 2017, arXiv:1706.02677, section 2.2.
    """
    check_schedule(name, warmup_fraction)
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps!r}: expected a whole number above 0")
    warmup_steps = round(total_steps * warmup_fraction)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return SCHEDULES[name](min(1.0, progress))


def check_schedule(name: str, warmup_fraction: float) -> None:
    """ValueError for an unknown schedule or a warmup_fraction outside 0…1."""
    _check_known("schedule", name, SCHEDULES)
    if not 0 <= warmup_fraction <= 1:
        raise ValueError(f"warmup={warmup_fraction!r}: expected a fraction of the steps, in 0…1")


def check_optimizer(name: str) -> None:
    """ValueError for an unknown optimiser."""
    _check_known("optimizer", name, OPTIMIZERS)


def _check_known(parameter: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{parameter}={name!r}: expected one of {', '.join(known)}{hint}")


def _sgd(groups: list[dict[str, Any]], lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def _adamw(groups: list[dict[str, Any]], lr: float, momentum: float) -> torch.optim.Optimizer:
    """Loshchilov & Hutter 2019, arXiv:1711.05101."""
    return torch.optim.AdamW(groups, lr=lr)


def _cosine(progress: float) -> float:
    """(1 + cos(π t)) / 2. Source: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, one cycle down to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


def _constant(progress: float) -> float:
    return 1.0


OPTIMIZERS: Mapping[str, Callable[[list[dict[str, Any]], float, float], torch.optim.Optimizer]] = MappingProxyType(
    {"sgd": _sgd, "adamw": _adamw}
)

SCHEDULES: Mapping[str, Callable[[float], float]] = MappingProxyType({"cosine": _cosine, "constant": _constant})
