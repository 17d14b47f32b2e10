"""The registry of ops by their names in policies and plans. It imports no op, so that every op may import it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from refract.plugins import PluginError, add_entry

if TYPE_CHECKING:
    from refract.augment.ops.base import Op

Adapter = Callable[[str, Mapping[str, Any]], "Op"]
"""(name, parameters) → the op that runs a third-party transform. ValueError for an unknown name or parameter."""

_ops: "dict[str, type[Op]]" = {}
_adapters: dict[str, Adapter] = {}

OPS: "Mapping[str, type[Op]]" = MappingProxyType(_ops)
"""Name in policies and plans → class. Importing `refract.augment` fills it."""

FORMER_NAMES = MappingProxyType({"Guest": "ThirdPartyTransform", "TextGuest": "ThirdPartyTextTransform"})
"""Former name of an op in policies and plans → its name."""


def register(ops: "Mapping[str, type[Op]]") -> None:
    """Add ops by name. ValueError where another op has the name."""
    for name, op in ops.items():
        if _ops.get(name, op) is not op:
            raise ValueError(f"two ops are called {name!r}: {_ops[name].__module__} and {op.__module__}; rename one")
    _ops.update(ops)


def register_op(op: "type[Op]") -> None:
    """Add the op of a plugin. PluginError if it is not an op, or if another op has the name."""
    if not isinstance(op, type) or not hasattr(op, "kind"):
        raise PluginError(f"@op: got {op!r}; expected a class derived from refract.augment.ops.base.Op")
    add_entry("op", _ops, op.__name__, op)


def register_adapter(library: str, adapter: Adapter) -> None:
    """Let policies name the transforms of a library as `library.Transform`."""
    _adapters[library] = adapter


def adapter_of(name: object) -> Adapter | None:
    """The adapter for a name such as `albumentations.RandomFog`; None for a name without a known library."""
    library, dot, _ = str(name).partition(".")
    return _adapters.get(library) if dot else None
