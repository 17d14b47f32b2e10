"""What every op is: validated parameters and a draw. What a drawn op *does* is the matter of its kind (`geometric.py`, `color.py`, …)."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from refract.augment.plan import Step

LARGEST = 1e9
"""What a number in a policy may be where its own meaning sets no bound: more would leave what floating point tells apart."""

LARGEST_SIDE = 32_767
"""Pixels; OpenCV's warps count in 16 bits."""

Args = dict[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Op:
    """Parameters, checked when the op is made; ValueError names the parameter, the value and what is accepted.

    p: probability in [0, 1] that a sample gets the op at all.
    """

    kind: ClassVar[str]
    by_epoch: ClassVar[bool] = True
    """Whether each epoch has its own stream; where not, `steps` sees the epoch, but draws the same in all."""
    p: float = 1.0

    def __post_init__(self) -> None:
        self._set("p", number("p", self.p, 0, 1))

    @property
    def name(self) -> str:
        """What the op is called in a policy."""
        return type(self).__name__

    def draw(self, rng: np.random.Generator, size: Size) -> Args | None:
        """The op's numbers for one sample of `size` (height, width), JSON values only; None where it would change nothing."""
        raise NotImplementedError

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        """What the op adds to a plan: with probability p its own step; ops that hold ops add theirs."""
        # `p` takes the stream's first number even where it is 1, so that changing it leaves the other draws as they were.
        if rng.random() >= self.p:
            return []
        args = self.draw(rng, size)
        return [] if args is None else [Step(self.name, args)]

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def below(rng: np.random.Generator, count: int) -> int:
    """A uniform whole number of 0 … count − 1; 0.3 µs where `rng.integers` takes 2.5."""
    return int(rng.random() * count)


def between(rng: np.random.Generator, edges: Any) -> float:
    """Uniform in [low, high); the same number as `rng.uniform` gives, in a third of the time."""
    low, high = edges
    return low + (high - low) * rng.random()


def number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number in [low, high]."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not low <= value <= high
        or abs(value) > LARGEST
    ):
        raise ValueError(f"{name}: {value!r} is not a number {_range(low, high)}")
    return value


def interval(name: str, value: Any, low: float, high: float) -> tuple[float, float]:
    """A pair (a, b) with low ≤ a ≤ b ≤ high; one number a stands for (a, a)."""
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: {value!r} is not a number or a pair [low, high]")
    first, last = (number(name, item, low, high) for item in pair)
    if first > last:
        raise ValueError(f"{name}: {value!r} has its low end above its high end")
    return first, last


def around(name: str, value: Any, low: float, high: float, centre: float) -> tuple[float, float]:
    """As `interval`, but one number a stands for (centre − a, centre + a), cut to [low, high]."""
    if isinstance(value, (list, tuple)):
        return interval(name, value, low, high)
    spread = number(name, value, 0, math.inf if high == math.inf else high - centre)
    return max(low, centre - spread), centre + spread


def pixels(name: str, value: Any) -> Size:
    """(height, width), both in 1 … `LARGEST_SIDE`; one integer stands for a square."""
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2 or not all(type(item) is int and 0 < item <= LARGEST_SIDE for item in pair):
        raise ValueError(
            f"{name}: {value!r} is not a positive whole number of pixels, nor a pair [height, width] of them, at most {LARGEST_SIDE}"
        )
    return pair[0], pair[1]


def whole(name: str, value: Any, low: int, high: int = LARGEST_SIDE) -> int:
    """A whole number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: {value!r} is not a whole number in [{low}, {high}]")
    return value


def choice(name: str, value: Any, accepted: tuple[str, ...]) -> str:
    if value not in accepted:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(accepted)}")
    return value


def color(name: str, value: Any) -> tuple[int, int, int]:
    """RGB in 0…255; one number stands for grey."""
    triple = value if isinstance(value, (list, tuple)) else (value, value, value)
    if len(triple) != 3 or not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 255 for v in triple):
        raise ValueError(f"{name}: {value!r} is not a grey level 0…255, nor a list of three of them (R, G, B)")
    return triple[0], triple[1], triple[2]


def nearest(name: Any, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing where no known name is near."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _range(low: float, high: float) -> str:
    if math.isinf(high):
        return "of any size" if math.isinf(low) else f"of at least {low:g}"
    return f"in [{low:g}, {high:g}]"
