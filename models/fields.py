"""Fields of dataclasses that declare their accepted values: numbers in a range, and names of a table. Imports no PyTorch.

`Checked`, the config's help and its JSON Schema read the declarations.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_args


class NotAccepted(ValueError):
    """A value that its field does not accept. owner: the dataclass; key: the field's name; expected: the accepted values in words."""

    def __init__(self, owner: type, key: str, value: object, expected: str) -> None:
        super().__init__(f"{key}={value!r}: expected {expected}")
        self.owner, self.key, self.value, self.expected = owner, key, value, expected


def number(
    default: float | None,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    nullable: bool = False,
    finite: bool = True,
) -> Any:
    """Return a field for a number above gt, of at least ge, below lt, of at most le.

    nullable: also accept None; implied by a default of None. finite: reject infinity; NaN is always rejected.
    The names of the bounds are those of pydantic, which puts them into the JSON Schema.
    """
    bounds = {"gt": gt, "ge": ge, "lt": lt, "le": le}
    declared = {name: bound for name, bound in bounds.items() if bound is not None}
    return field(default=default, metadata={**declared, "nullable": nullable or default is None, "finite": finite})


def one_of(default: str, names: Callable[[], Iterable[str]], *, extensible: bool = False) -> Any:
    """Return a field for one of the names.

    names: called at each check, as plugins add names; extensible: accept all names, as a plugin may be loaded later. The user of the
    value checks it.
    """
    return field(default=default, metadata={"names": names, "extensible": extensible})


def accepted(item: Field[Any]) -> str:
    """Describe the accepted values of a field, such as "a number in [0, 1)"; empty if the field declares none."""
    if "names" in item.metadata:
        return f"one of {', '.join(item.metadata['names']())}"
    low, high = _bound(item, "gt", "ge"), _bound(item, "lt", "le")
    if low is None:
        return ""
    kind = "a whole number" if item.type is int or int in get_args(item.type) else "a number"
    if high is None:
        words = f"{kind} above {low}" if "gt" in item.metadata else f"{kind} of at least {low}"
    else:
        words = f"{kind} in {'(' if 'gt' in item.metadata else '['}{low}, {high}{')' if 'lt' in item.metadata else ']'}"
    return f"{words}, or null" if item.metadata["nullable"] else words


def _bound(item: Field[Any], strict: str, inclusive: str) -> Any:
    return item.metadata.get(strict, item.metadata.get(inclusive))


@dataclass(frozen=True)
class Checked:
    """A dataclass that checks its fields when it is constructed. Raises NotAccepted."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.metadata and not _holds(item, value):
                raise NotAccepted(type(self), item.name, value, accepted(item) + _hint(item, value))


def _hint(item: Field[Any], value: Any) -> str:
    near = difflib.get_close_matches(str(value), item.metadata.get("names", tuple)(), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _holds(item: Field[Any], value: Any) -> bool:
    bounds = item.metadata
    if "names" in bounds:
        return bounds["extensible"] or value in tuple(bounds["names"]())
    if value is None:
        return bool(bounds["nullable"])
    above = value > bounds["gt"] if "gt" in bounds else value >= bounds.get("ge", -math.inf)
    below = value < bounds["lt"] if "lt" in bounds else value <= bounds.get("le", math.inf)
    return above and below and (math.isfinite(value) or not bounds["finite"])
