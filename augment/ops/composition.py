"""Composition ops: they hold other ops and choose which of them apply to a sample. A plan lists only the chosen ops.

The parameter `ops` is a list in a policy's format, `[{Rotate: {degrees: 10}}, HorizontalFlip]`, or a list of `Op` instances.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from refract.augment.ops.base import Op, Size, below, number, whole
from refract.augment.ops.geometric import GeometricOp
from refract.augment.ops.reader import read_ops
from refract.augment.plan import Step
from refract.augment.registry import OPS


@dataclass(frozen=True, kw_only=True)
class CompositionOp(Op):
    """ops: the ops to choose from, at least one.

    Batch-mixing ops (MixUp, CutMix) combine only with each other, and so do text ops; ValueError otherwise.
    """

    kind: ClassVar[str] = "composition"
    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("ops", _read("ops", self.ops))
        if not self.ops:
            raise ValueError("ops: the list is empty; add at least one op")
        if len({mixes_batch(op) for op in self.ops}) > 1:
            raise ValueError("ops: batch-mixing ops (MixUp, CutMix) and other ops need separate lists")
        if len({changes_text(op) for op in self.ops}) > 1:
            raise ValueError("ops: text ops and image ops need separate lists")


def mixes_batch(op: Op) -> bool:
    """Whether the op, or an op that it holds, mixes samples of the batch."""
    return op.kind == "batch" or (isinstance(op, CompositionOp) and any(mixes_batch(inner) for inner in op.ops))


def changes_text(op: Op) -> bool:
    """Whether the op, or an op that it holds, changes texts."""
    return op.kind == "text" or (isinstance(op, CompositionOp) and any(changes_text(inner) for inner in op.ops))


def may_move(op: Op) -> bool:
    """Whether the op, or an op that it holds, is geometric."""
    return isinstance(op, GeometricOp) or (isinstance(op, CompositionOp) and any(may_move(inner) for inner in op.ops))


def _read(name: str, entries: Any) -> tuple[Op, ...]:
    return tuple(read_ops(entries, name))


def draw_in_turn(ops: Sequence[Op], rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
    """Draw the steps of all ops in order. Each op draws for the output size of the ops before it."""
    steps: list[Step] = []
    for op in ops:
        drawn = op.steps(rng, size, epoch)
        size = size_after(drawn, size)
        steps += drawn
    return steps


def size_after(steps: Sequence[Step], size: Size) -> Size:
    """Return (height, width) of an image of `size` after the steps."""
    for step in steps:
        op = OPS[step.op]
        if issubclass(op, GeometricOp):
            size = op.output_size(dict(step.args), size)
    return size


@dataclass(frozen=True, kw_only=True)
class Compose(CompositionOp):
    """Apply all ops in order with probability `p`, otherwise none."""

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        return draw_in_turn(self.ops, rng, size, epoch) if rng.random() < self.p else []


@dataclass(frozen=True, kw_only=True)
class Sometimes(CompositionOp):
    """Apply `ops` in order with probability `p`, otherwise apply `otherwise` in order."""

    p: float = 0.5
    otherwise: tuple[Op, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("otherwise", _read("otherwise", self.otherwise))

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        return draw_in_turn(self.ops if rng.random() < self.p else self.otherwise, rng, size, epoch)


@dataclass(frozen=True, kw_only=True)
class OneOf(CompositionOp):
    """Choose one of the ops; the chosen op's own p then decides whether it applies.

    weights: one relative weight per op, at least 0, not all zero; an empty list means equal weights.
    """

    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("weights", _weights(self.weights, len(self.ops)))

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        if rng.random() >= self.p:
            return []
        ends = np.cumsum(self.weights or [1.0] * len(self.ops))
        chosen = int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
        return self.ops[min(chosen, len(self.ops) - 1)].steps(rng, size, epoch)


@dataclass(frozen=True, kw_only=True)
class SomeOf(CompositionOp):
    """Apply a random subset of the ops, in the policy's order.

    count: size of the subset, one number or [low, high], drawn uniformly among the whole numbers. in_order: false shuffles the subset.
    """

    count: int | tuple[int, int] = (1, 2)
    in_order: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        pair = self.count if isinstance(self.count, (list, tuple)) else (self.count, self.count)
        if len(pair) != 2 or not 0 <= whole("count", pair[0], 0) <= whole("count", pair[1], 0) <= len(self.ops):
            raise ValueError(
                f"count: {self.count!r} is not a whole number or a pair [low, high] in [0, {len(self.ops)}]"
            )
        self._set("count", (pair[0], pair[1]))
        if not isinstance(self.in_order, bool):
            raise ValueError(f"in_order: {self.in_order!r} is neither true nor false")

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        if rng.random() >= self.p:
            return []
        low, high = self.count  # type: ignore[misc]
        count = low + below(rng, high - low + 1)
        order = rng.permutation(len(self.ops))[:count].tolist()
        return draw_in_turn([self.ops[i] for i in (sorted(order) if self.in_order else order)], rng, size, epoch)


@dataclass(frozen=True, kw_only=True)
class During(CompositionOp):
    """Apply the ops in order during a range of epochs.

    epochs: [first, last], counted from 0, both included; `last: null` means until the end of training.
    """

    epochs: tuple[int, int | None] = (0, None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.epochs, (list, tuple)) or len(self.epochs) != 2:
            raise ValueError(f"epochs: {self.epochs!r} is not a pair [first, last]")
        first, last = self.epochs
        if whole("epochs", first, 0, 10**9) > (whole("epochs", last, 0, 10**9) if last is not None else first):
            raise ValueError(f"epochs: {self.epochs!r} ends before it starts")
        self._set("epochs", (first, last))

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        first, last = self.epochs
        if epoch < first or (last is not None and epoch > last) or rng.random() >= self.p:
            return []
        return draw_in_turn(self.ops, rng, size, epoch)


@dataclass(frozen=True, kw_only=True)
class Ramp(CompositionOp):
    """Interpolate one op's parameters linearly over the epochs.

    ops: two entries of the same op, with its parameters in the first and in the last of `epochs`. Numbers that differ are interpolated;
    whole numbers are rounded. Earlier epochs use the first entry, later epochs the second.
    """

    epochs: tuple[int, int] = (0, 10)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.ops) != 2 or type(self.ops[0]) is not type(self.ops[1]) or isinstance(self.ops[0], CompositionOp):
            raise ValueError(
                "ops: expected two entries of the same op, with its first and its last parameters; composition ops are not accepted"
            )
        if not isinstance(self.epochs, (list, tuple)) or len(self.epochs) != 2:
            raise ValueError(f"epochs: {self.epochs!r} is not a pair [first, last]")
        if whole("epochs", self.epochs[0], 0, 10**9) >= whole("epochs", self.epochs[1], 0, 10**9):
            raise ValueError(f"epochs: {self.epochs!r} does not end after it starts")
        first, last = self.epochs
        if last - first > 10_000:
            raise ValueError(f"epochs: {self.epochs!r} spans more than 10,000 epochs")
        self._set("epochs", (first, last))
        # Building the op of every epoch here reports invalid parameters before training.
        self._set("_op_of_epoch", tuple(self._interpolated(epoch) for epoch in range(first, last + 1)))

    def at(self, epoch: int) -> Op:
        """Return the op with the parameters of an epoch."""
        first, last = self.epochs
        op: Op = self._op_of_epoch[min(max(epoch, first), last) - first]  # type: ignore[attr-defined]
        return op

    def _interpolated(self, epoch: int) -> Op:
        first, last = self.epochs
        first_op, last_op = self.ops
        names = [item.name for item in fields(first_op)]
        fraction = (epoch - first) / (last - first)
        try:
            values = {name: _lerp(name, getattr(first_op, name), getattr(last_op, name), fraction) for name in names}
            return type(first_op)(**values)
        except ValueError as error:
            raise ValueError(f"ops: cannot be interpolated in epoch {epoch}: {error}") from error

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        return self.at(epoch).steps(rng, size, epoch) if rng.random() < self.p else []


def _lerp(name: str, first: Any, last: Any, fraction: float) -> Any:
    if isinstance(first, tuple) and isinstance(last, tuple) and len(first) == len(last):
        return tuple(_lerp(name, a, b, fraction) for a, b in zip(first, last, strict=True))
    if first == last:
        return first
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in (first, last)):
        raise ValueError(f"{name}: {first!r} and {last!r} cannot be interpolated; only numbers may differ")
    value = first + fraction * (last - first)
    return round(value) if isinstance(first, int) and isinstance(last, int) else value


def _weights(weights: Any, count: int) -> tuple[float, ...]:
    if not isinstance(weights, (list, tuple)) or len(weights) not in (0, count):
        raise ValueError(f"weights: expected {count} numbers, one for each op, got {weights!r}")
    checked = tuple(number("weights", weight, 0, 1e12) for weight in weights)
    if checked and sum(checked) <= 0:
        raise ValueError(f"weights: {weights!r} are all zero; at least one must be positive")
    return checked


COMPOSITION: Mapping[str, type[Op]] = MappingProxyType(
    {"Compose": Compose, "Sometimes": Sometimes, "OneOf": OneOf, "SomeOf": SomeOf, "During": During, "Ramp": Ramp}
)
