"""The names under which earlier versions stored the weights of a `Reader`: bundles, checkpoints and weight files with them still load."""

from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Any

FORMER_NAMES: Mapping[str, str] = MappingProxyType({"pictures": "images", "no_picture": "no_image"})
"""Former name of a module or parameter of `Reader` → its name."""


def rename(weights: dict[str, Any], prefix: str) -> None:
    """Rename the keys of a state dict that an earlier version stored, in place. prefix: of the keys of the `Reader`, such as `network.`."""
    for key in [key for key in weights if key.startswith(prefix)]:
        name, dot, rest = key.removeprefix(prefix).partition(".")
        if name in FORMER_NAMES:
            weights[f"{prefix}{FORMER_NAMES[name]}{dot}{rest}"] = weights.pop(key)


def present_name(key: str, expected: Container[str]) -> str:
    """Return the key in `expected` that an earlier version stored as `key`. Any other key is returned unchanged.

    key: of a state dict, with any prefix, such as `classifier.network.pictures.head.weight`.
    """
    if key in expected:
        return key
    parts = key.split(".")
    for index, part in enumerate(parts):
        if part in FORMER_NAMES:
            renamed = ".".join([*parts[:index], FORMER_NAMES[part], *parts[index + 1 :]])
            if renamed in expected:
                return renamed
    return key
