"""Entries of a policy, as YAML or Python give them, to ops."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from refract.augment.ops.base import Op, nearest
from refract.augment.registry import FORMER_NAMES, OPS, adapter_of
from refract.errors import InputError

log = logging.getLogger(__name__)


class PolicyError(InputError):
    """Invalid policy. The message names the source, the op, the parameter and the accepted values."""


def read_ops(entries: Any, where: str) -> Iterator[Op]:
    """Yield the ops of a list of entries. where: the name of the list in error messages. PolicyError for an invalid entry."""
    if isinstance(entries, (str, bytes, Mapping)) or not isinstance(entries, Iterable):
        raise PolicyError(
            f"{where}: a policy is a list of ops such as [{{HorizontalFlip: {{p: 0.5}}}}], not {entries!r}"
        )
    for number, entry in enumerate(entries, start=1):
        yield entry if isinstance(entry, Op) else _op(entry, f"{where}, op {number}")


def _op(entry: Any, where: str) -> Op:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise PolicyError(
            f"{where}: expected one op's name with its parameters, such as {{Rotate: {{degrees: 10}}}}; got {entry!r}"
        )
    ((name, parameters),) = entry.items()
    if name in FORMER_NAMES:
        _warn(where, name, FORMER_NAMES[name])
        name = FORMER_NAMES[name]
    adapter = adapter_of(name)
    if name not in OPS and adapter is None:
        raise PolicyError(f"{where}: no op is called {name!r}{nearest(name, OPS)} (known: {', '.join(OPS)})")
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, Mapping):
        raise PolicyError(f"{where}, {name}: parameters are a mapping such as {{p: 0.5}}, not {parameters!r}")
    if name in OPS:
        parameters = _with_new_names(parameters, OPS[name].former, f"{where}, {name}")
    known = [item.name for item in fields(OPS[name])] if name in OPS else []
    for parameter in parameters:
        if known and parameter not in known:
            raise PolicyError(
                f"{where}, {name}: no parameter {parameter!r}{nearest(parameter, known)} (known: {', '.join(known)})"
            )
    try:
        return OPS[name](**parameters) if adapter is None else adapter(name, parameters)
    except (TypeError, ValueError) as error:
        message = str(error).replace(f"{name}.__init__() ", "")
        raise PolicyError(f"{where}, {name}: {message}") from error


def _with_new_names(parameters: Mapping[str, Any], former: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return the parameters under their present names; log a warning for each former name. PolicyError if both names are given."""
    for old in former.keys() & parameters.keys():
        if former[old] in parameters:
            raise PolicyError(f"{where}: {old} is the former name of {former[old]}; remove {old}")
        _warn(where, old, former[old])
    return {former.get(name, name): value for name, value in parameters.items()}


def _warn(where: str, old: str, new: str) -> None:
    log.warning("%s: %s is deprecated; write %s", where, old, new)
