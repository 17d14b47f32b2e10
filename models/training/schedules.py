"""Learning rate schedules with a linear warm-up. Importing this module imports no PyTorch."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from refract.models.layers import pick


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
