"""What networks are made of, each kind by name: activations, norms, pooling, convolutions, initialisation."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def pick(kind: str, name: str, known: Mapping[str, Entry]) -> Entry:
    """The entry `name` of a table. ValueError names the nearest one and all of them."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{kind}={name!r}: expected one of {', '.join(known)}{hint}")
