"""Ops that hold ops: they choose which of them a sample gets. Only the chosen ones appear in its plan.

A parameter `ops` is a list as a policy's own: `[{Rotate: {degrees: 10}}, HorizontalFlip]`, or ops made in Python.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from refract.augment.ops.base import Op, Size, below, number, whole
from refract.augment.ops.geometric import GeometricOp
from refract.augment.plan import Step


@dataclass(frozen=True, kw_only=True)
class CompositionOp(Op):
    """ops: those to choose from, at least one; either all of them mix the batch (MixUp, CutMix), or none does;
    and either all of them change texts, or none does."""

    kind: ClassVar[str] = "choice"
    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("ops", _read("ops", self.ops))
        if not self.ops:
            raise ValueError("ops: an empty list leaves nothing to choose from")
        if len({mixes_batch(op) for op in self.ops}) > 1:
            raise ValueError("ops: those that mix the batch (MixUp, CutMix) cannot be chosen beside those that do not")
        if len({changes_text(op) for op in self.ops}) > 1:
            raise ValueError("ops: those that change texts cannot be chosen beside those that change images")


def mixes_batch(op: Op) -> bool:
    """Whether an op, or what it holds, mixes the batch."""
    return op.kind == "batch" or (isinstance(op, CompositionOp) and any(mixes_batch(own) for own in op.ops))


def changes_text(op: Op) -> bool:
    """Whether an op, or what it holds, changes texts."""
    return op.kind == "text" or (isinstance(op, CompositionOp) and any(changes_text(own) for own in op.ops))


def may_move(op: Op) -> bool:
    """Whether an op, or what it holds, is geometric."""
    return isinstance(op, GeometricOp) or (isinstance(op, CompositionOp) and any(may_move(own) for own in op.ops))


def _read(name: str, entries: Any) -> tuple[Op, ...]:
    from refract.augment.policy import read_ops  # the policy's reader knows every op, these here too

    return tuple(read_ops(entries, name))


def draw_in_turn(ops: Sequence[Op], rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
    """The steps of all the ops, each drawn for the size that the ones before leave."""
    steps: list[Step] = []
    for op in ops:
        drawn = op.steps(rng, size, epoch)
        size = size_after(drawn, size)
        steps += drawn
    return steps


def size_after(steps: Sequence[Step], size: Size) -> Size:
    """(height, width) of an image of `size` after the steps."""
    from refract.augment.ops import OPS

    for step in steps:
        op = OPS[step.op]
        if issubclass(op, GeometricOp):
            size = op.output_size(dict(step.args), size)
    return size


@dataclass(frozen=True, kw_only=True)
class Compose(CompositionOp):
    """All of the ops in their order, together with probability `p` or none of them."""

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        return draw_in_turn(self.ops, rng, size, epoch) if rng.random() < self.p else []


@dataclass(frozen=True, kw_only=True)
class Sometimes(CompositionOp):
    """With probability `p` the ops, otherwise those of `otherwise`, each list in its order."""

    p: float = 0.5
    otherwise: tuple[Op, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("otherwise", _read("otherwise", self.otherwise))

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        return draw_in_turn(self.ops if rng.random() < self.p else self.otherwise, rng, size, epoch)


@dataclass(frozen=True, kw_only=True)
class OneOf(CompositionOp):
    """One of the ops; the chosen op's own p then decides whether it acts.

    weights: how likely each is, positive, in any unit; none means equally.
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
    """A drawn number of the ops, none twice, in the policy's order.

    count: how many, one number or [low, high], drawn uniformly among the whole numbers; in_order: false puts them in a drawn order.
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
    """The ops in their order, in some epochs only.

    epochs: [first, last], counted from 0, both included; a last of null means to the end.
    """

    epochs: tuple[int, int | None] = (0, None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.epochs, (list, tuple)) or len(self.epochs) != 2:
            raise ValueError(f"epochs: {self.epochs!r} is not a pair [first, last]")
        first, last = self.epochs
        if whole("epochs", first, 0, 10**9) > (whole("epochs", last, 0, 10**9) if last is not None else first):
            raise ValueError(f"epochs: {self.epochs!r} ends before it begins")
        self._set("epochs", (first, last))

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        first, last = self.epochs
        if epoch < first or (last is not None and epoch > last) or rng.random() >= self.p:
            return []
        return draw_in_turn(self.ops, rng, size, epoch)


@dataclass(frozen=True, kw_only=True)
class Ramp(CompositionOp):
    """One op whose parameters go from those of its first form to those of its second over the epochs, in equal steps.

    ops: two entries of the same op, as it is at the first and at the last of `epochs`; every number that differs between them is
    interpolated, whole numbers to the nearest. Before the first epoch it is the first form, after the last the second.
    """

    epochs: tuple[int, int] = (0, 10)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.ops) != 2 or type(self.ops[0]) is not type(self.ops[1]) or isinstance(self.ops[0], CompositionOp):
            raise ValueError("ops: expected two entries of one simple op, its first and its last form")
        if not isinstance(self.epochs, (list, tuple)) or len(self.epochs) != 2:
            raise ValueError(f"epochs: {self.epochs!r} is not a pair [first, last]")
        if whole("epochs", self.epochs[0], 0, 10**9) >= whole("epochs", self.epochs[1], 0, 10**9):
            raise ValueError(f"epochs: {self.epochs!r} does not end after it begins")
        first, last = self.epochs
        if last - first > 10_000:
            raise ValueError(f"epochs: {self.epochs!r} are more than 10,000")
        self._set("epochs", (first, last))
        # All forms now, so that one that cannot be is told before training.
        self._set("_forms", tuple(self._form(epoch) for epoch in range(first, last + 1)))

    def at(self, epoch: int) -> Op:
        """The op as it is in an epoch."""
        first, last = self.epochs
        form: Op = self._forms[min(max(epoch, first), last) - first]  # type: ignore[attr-defined]
        return form

    def _form(self, epoch: int) -> Op:
        first, last = self.epochs
        one, other = self.ops
        names = [item.name for item in fields(one)]
        share = (epoch - first) / (last - first)
        try:
            values = {name: _between(name, getattr(one, name), getattr(other, name), share) for name in names}
            return type(one)(**values)
        except ValueError as error:
            raise ValueError(f"ops: cannot be joined in epoch {epoch}: {error}") from error

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        return self.at(epoch).steps(rng, size, epoch) if rng.random() < self.p else []


def _between(name: str, first: Any, last: Any, share: float) -> Any:
    if isinstance(first, tuple) and isinstance(last, tuple) and len(first) == len(last):
        return tuple(_between(name, a, b, share) for a, b in zip(first, last, strict=True))
    if first == last:
        return first
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in (first, last)):
        raise ValueError(f"{name} goes from {first!r} to {last!r}, and only numbers have something in between")
    value = first + share * (last - first)
    return round(value) if isinstance(first, int) and isinstance(last, int) else value


def _weights(weights: Any, count: int) -> tuple[float, ...]:
    if not isinstance(weights, (list, tuple)) or len(weights) not in (0, count):
        raise ValueError(f"weights: expected {count} numbers, one for each op, got {weights!r}")
    checked = tuple(number("weights", weight, 0, 1e12) for weight in weights)
    if checked and sum(checked) <= 0:
        raise ValueError(f"weights: {weights!r} are all zero")
    return checked


COMPOSITION: Mapping[str, type[Op]] = MappingProxyType(
    {"Compose": Compose, "Sometimes": Sometimes, "OneOf": OneOf, "SomeOf": SomeOf, "During": During, "Ramp": Ramp}
)
