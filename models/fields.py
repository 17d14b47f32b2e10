"""Fields of dataclasses that declare their accepted values: numbers in a range, and names of a table. Imports no PyTorch.

`check_fields`, the config's help and its JSON Schema read the declarations.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import Field, field, fields
from typing import Any


class NotAccepted(ValueError):
    """A value that its field does not accept. owner: the dataclass; key: the field's name."""

    def __init__(self, owner: type, key: str, value: object, expected: str) -> None:
        super().__init__(f"{key}={value!r}: expected {expected}")
        self.owner, self.key = owner, key


def number(
    default: float | None,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
) -> Any:
    """Return a field for a finite number above gt, of at least ge, below lt, of at most le; also for None if `default` is None.

    The names of the bounds are those of pydantic, which puts them into the JSON Schema.
    """
    bounds = {"gt": gt, "ge": ge, "lt": lt, "le": le}
    return field(default=default, metadata={name: bound for name, bound in bounds.items() if bound is not None})


def one_of(default: str, names: Callable[[], Iterable[str]]) -> Any:
    """Return a field for one of the names. names: called at each check, as plugins add names."""
    return field(default=default, metadata={"names": names})


def accepted(item: Field[Any]) -> str:
    """Describe the accepted values of a field, such as "a number in [0, 1)"; empty if the field declares none."""
    if "names" in item.metadata:
        return f"one of {', '.join(item.metadata['names']())}"
    low, high = _bound(item, "gt", "ge"), _bound(item, "lt", "le")
    if low is None:
        return ""
    if high is None:
        words = f"a number above {low}" if "gt" in item.metadata else f"a number of at least {low}"
    else:
        words = (
            f"a number in {'(' if 'gt' in item.metadata else '['}{low}, {high}{')' if 'lt' in item.metadata else ']'}"
        )
    return f"{words}, or null" if item.default is None else words


def _bound(item: Field[Any], strict: str, inclusive: str) -> Any:
    return item.metadata.get(strict, item.metadata.get(inclusive))


def check_fields(values: Any) -> None:
    """Raise NotAccepted for the first field of a dataclass whose value it does not accept."""
    for item in fields(values):
        value = getattr(values, item.name)
        if (words := accepted(item)) and not _holds(item, value):
            near = (
                difflib.get_close_matches(str(value), item.metadata["names"](), n=1) if "names" in item.metadata else ()
            )
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise NotAccepted(type(values), item.name, value, words + hint)


def _holds(item: Field[Any], value: Any) -> bool:
    bounds = item.metadata
    if "names" in bounds:
        return value in tuple(bounds["names"]())
    if value is None:
        return item.default is None
    above = value > bounds["gt"] if "gt" in bounds else value >= bounds.get("ge", -math.inf)
    below = value < bounds["lt"] if "lt" in bounds else value <= bounds.get("le", math.inf)
    return math.isfinite(value) and above and below
