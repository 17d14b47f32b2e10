"""`Plan`: the steps drawn for one sample, each an op's name with plain numbers. A plan is serialised as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import index as index_of
from typing import Any

from refract.augment.registry import FORMER_NAMES, OPS
from refract.augment.resize_libraries import REFRACT, check_interpolation

VERSION = 1


@dataclass(frozen=True)
class Step:
    """One drawn op: its registered name and the arguments of its execution (JSON values only)."""

    op: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = (f"{key}={_short(value)}" for key, value in self.args.items())
        return f"{self.op}({', '.join(shown)})"


@dataclass(frozen=True)
class Plan:
    """The steps for one sample, in order.

    size: (height, width) in pixels of the image that the plan was drawn for.
    exact: whether each step runs separately, rounded and clipped, instead of fused with its neighbours.
    interpolation: what resamples bilinearly: `refract`, or a library of `refract.augment.resize_libraries`.
    """

    size: tuple[int, int]
    steps: tuple[Step, ...]
    exact: bool = False
    interpolation: str = REFRACT

    def to_json(self) -> str:
        """Return one line of JSON. `Plan.from_json` restores an equal plan, to the last bit."""
        steps = [{"op": step.op, **step.args} for step in self.steps]
        options: dict[str, Any] = {"exact": True} if self.exact else {}
        if self.interpolation != REFRACT:
            options["interpolation"] = self.interpolation
        return json.dumps({"version": VERSION, "size": list(self.size), **options, "steps": steps})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read the result of `to_json`. ValueError describes invalid input."""
        try:
            data = json.loads(text)
            height, width = (index_of(side) for side in data["size"])
            version, entries, exact = data["version"], data["steps"], bool(data.get("exact", False))
            interpolation = str(data.get("interpolation", REFRACT))
            check_interpolation(interpolation)
            steps = []
            for entry in entries:
                args = dict(entry)
                steps.append(_step(str(args.pop("op")), args))
            _check_finite(entries)
        except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a plan: {error!r} in {text[:80]!r}") from error
        if version != VERSION:
            raise ValueError(f"plan has version {version!r}; this Refract reads version {VERSION}")
        if height < 1 or width < 1:
            raise ValueError(f"plan was drawn for {height}×{width} pixels; both sides must be at least 1")
        known = [
            name for name, op in OPS.items() if op.kind != "composition"
        ]  # a composition op adds only the steps of the ops it chose
        unknown = [step.op for step in steps if step.op not in known]
        if unknown:
            raise ValueError(f"plan has the unknown op {unknown[0]!r}; known: {', '.join(known)}")
        return cls((height, width), tuple(steps), exact, interpolation)


def _step(op: str, args: Mapping[str, Any]) -> Step:
    """Return the step under the present names of the op and its arguments."""
    name = FORMER_NAMES.get(op, op)
    former = OPS[name].former if name in OPS else {}
    return Step(name, {former.get(key, key): value for key, value in args.items()})


def _check_finite(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        _check_finite(inner)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return str(value)
