"""The base class of all ops, and the checks of their parameters.

An op validates parameters and draws random arguments. The file of its kind (`geometric.py`, `color.py`, …) applies them to pixels.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from refract.augment.plan import Step

LARGEST = 1e9
"""Largest absolute value of a parameter without a specific bound; floating point loses precision above it."""

LARGEST_SIDE = 32_767
"""Largest side of an image in pixels: OpenCV's warps use signed 16-bit coordinates."""

Args = dict[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Op:
    """Validate an op's parameters at construction and draw its arguments for each sample.

    p: probability in [0, 1] that the op applies to a sample.
    Raises ValueError with the parameter, its value and the accepted values.
    """

    kind: ClassVar[str]
    by_epoch: ClassVar[bool] = True
    """Whether each epoch has its own random stream. If false, `steps` receives the epoch but draws the same numbers in all epochs."""
    former: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Former name of a parameter, or of an argument in a plan → its name. Policies and plans may have either."""
    p: float = 1.0

    def __post_init__(self) -> None:
        self._set("p", number("p", self.p, 0, 1))

    @property
    def name(self) -> str:
        """The op's name in a policy."""
        return type(self).__name__

    def draw(self, rng: np.random.Generator, size: Size) -> Args | None:
        """Draw the arguments for one sample of `size` (height, width). JSON values only; None if the op would change nothing."""
        raise NotImplementedError

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        """Draw the steps that the op adds to a plan: its own step with probability p; composition ops add the steps of their ops."""
        # `p` consumes the first number of the stream even if it is 1, so that a change of `p` does not change the other draws.
        if rng.random() >= self.p:
            return []
        args = self.draw(rng, size)
        return [] if args is None else [Step(self.name, args)]

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def below(rng: np.random.Generator, count: int) -> int:
    """Draw a uniform integer from 0 … count − 1. Takes 0.3 µs, `rng.integers` 2.5 µs."""
    return int(rng.random() * count)


def between(rng: np.random.Generator, edges: Any) -> float:
    """Draw a uniform float from [low, high): the same value as `rng.uniform`, in a third of the time."""
    low, high = edges
    return low + (high - low) * rng.random()


def number(name: str, value: Any, low: float, high: float) -> float:
    """Check that `value` is a finite number in [low, high] and return it."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not low <= value <= high
        or abs(value) > LARGEST
    ):
        raise ValueError(f"{name}: {value!r} is not a number {_range(low, high)}")
    return value


def interval(name: str, value: Any, low: float, high: float) -> tuple[float, float]:
    """Check and return a pair (a, b) with low ≤ a ≤ b ≤ high. One number a means (a, a)."""
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: {value!r} is not a number or a pair [low, high]")
    first, last = (number(name, item, low, high) for item in pair)
    if first > last:
        raise ValueError(f"{name}: {value!r} has its lower bound above its upper bound")
    return first, last


def around(name: str, value: Any, low: float, high: float, centre: float) -> tuple[float, float]:
    """Check as `interval` does, but one number a means (centre − a, centre + a), with the lower bound clipped to `low`.

    A number larger than high − centre raises ValueError.
    """
    if isinstance(value, (list, tuple)):
        return interval(name, value, low, high)
    spread = number(name, value, 0, math.inf if high == math.inf else high - centre)
    return max(low, centre - spread), centre + spread


def pixels(name: str, value: Any) -> Size:
    """Check and return (height, width), both in 1 … `LARGEST_SIDE`. One integer means a square."""
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2 or not all(type(item) is int and 0 < item <= LARGEST_SIDE for item in pair):
        raise ValueError(
            f"{name}: {value!r} is not a side in pixels or a pair [height, width]; accepted: whole numbers in [1, {LARGEST_SIDE}]"
        )
    return pair[0], pair[1]


def whole(name: str, value: Any, low: int, high: int = LARGEST_SIDE) -> int:
    """Check that `value` is an integer in [low, high] and return it."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: {value!r} is not a whole number in [{low}, {high}]")
    return value


def choice(name: str, value: Any, accepted: tuple[str, ...]) -> str:
    """Check that `value` is one of the accepted strings and return it."""
    if value not in accepted:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(accepted)}")
    return value


def color(name: str, value: Any) -> tuple[int, int, int]:
    """Check and return (R, G, B), each in 0…255. One number means a grey level."""
    triple = value if isinstance(value, (list, tuple)) else (value, value, value)
    if len(triple) != 3 or not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 255 for v in triple):
        raise ValueError(f"{name}: {value!r} is not a grey level in 0…255 or a list [R, G, B] of three")
    return triple[0], triple[1], triple[2]


def nearest(name: Any, known: Iterable[str]) -> str:
    """Return `; did you mean X?`, or an empty string if no known name is similar."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _range(low: float, high: float) -> str:
    if math.isinf(high):
        return "of any size" if math.isinf(low) else f"of at least {low:g}"
    return f"in [{low:g}, {high:g}]"
