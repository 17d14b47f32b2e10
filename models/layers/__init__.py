"""Layers by name: activations, norms, pooling, convolutions, initialisation."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def pick(kind: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """Return the entry `name` of a table. ValueError for an unknown name; the message lists all names and the nearest one."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{kind}={name!r}: expected one of {', '.join(table)}{hint}")
