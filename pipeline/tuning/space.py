"""What a search may change: dotted keys of the config with the values that they may take, read from YAML.

    optim.lr: {low: 1e-4, high: 1e-1, log: true}
    optim.name: [adamw, sgd]
    optim.momentum: {low: 0.8, high: 0.99, when: {optim.name: sgd}}
    augment.policy.0.RandAugment.magnitude: {low: 1, high: 10, whole: true}

A number in a key is a place in a list, so the ops of a policy and their parameters are keys as any other.
"""

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refract.augment import load_policy
from refract.pipeline.config.config import ConfigError


@dataclass(frozen=True)
class Dimension:
    """One key. choices: its values, or none for a number from low to high, both included, by log in its logarithm, by whole a whole one.
    when: other keys of the space with the value that they must have for this one to matter."""

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    when: tuple[tuple[str, Any], ...] = ()


def read_space(path: Path) -> list[Dimension]:
    """ConfigError names what is wrong, and the key."""
    import yaml

    from refract.augment.yaml_text import read_yaml

    try:
        values = read_yaml(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, Mapping) or not values:
        raise ConfigError(
            f"{path}: expected keys of the config with their values, as optim.lr: {{low: 1e-4, high: 1e-1, log: true}}"
        )
    space = [_dimension(str(key), value, str(path)) for key, value in values.items()]
    known: dict[str, tuple[Any, ...]] = {}
    for dimension in space:
        for other, value in dimension.when:
            if other not in known:
                raise ConfigError(f"{path}: {dimension.key}: when: {other!r} is no key of the space above it")
            if value not in known[other]:
                raise ConfigError(f"{path}: {dimension.key}: when: {value!r} is none of the choices of {other}")
        known[dimension.key] = dimension.choices
    return space


def _dimension(key: str, value: Any, where: str) -> Dimension:
    if isinstance(value, list):
        if not value or any(not isinstance(item, str | int | float | bool | None) for item in value):
            raise ConfigError(f"{where}: {key}: {value!r} is not a list of plain values")
        return Dimension(key, choices=tuple(_number(item) for item in value))
    accepted = "a list of values, or {low: …, high: …, log: true, whole: true, when: {KEY: VALUE}}"
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key}: {value!r} is not {accepted}")
    when = value.get("when") or {}
    when = {name: _number(wanted) for name, wanted in when.items()} if isinstance(when, Mapping) else when
    if "choices" in value and isinstance(when, Mapping) and not set(value) - {"choices", "when"}:
        return Dimension(key, choices=_dimension(key, value["choices"], where).choices, when=tuple(when.items()))
    ends = _number(value.get("low")), _number(value.get("high"))
    log, whole = value.get("log", False), value.get("whole", False)
    numbers = [
        float(end) for end in ends if isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end)
    ]
    if set(value) - {"low", "high", "log", "whole", "when"} or len(numbers) < 2 or not isinstance(when, Mapping):
        raise ConfigError(f"{where}: {key}: {value!r} is not {accepted}")
    low, high = numbers
    if not isinstance(log, bool) or not isinstance(whole, bool) or low >= high or (log and low <= 0):
        raise ConfigError(f"{where}: {key}: {value!r}: low must be below high, and above 0 for log")
    if whole and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"{where}: {key}: {value!r}: a whole number lies between whole ones")
    return Dimension(key, low=low, high=high, log=log, whole=whole, when=tuple(when.items()))


def _number(value: Any) -> Any:
    """YAML takes 1e-4, without a point, for a text."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def applies(dimension: Dimension, drawn: Mapping[str, Any]) -> bool:
    """Whether the dimension matters beside what was drawn before it."""
    return all(drawn.get(other) == value for other, value in dimension.when)


def with_values(config: Mapping[str, Any], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The config's values with the drawn ones in their places. ConfigError for a key whose place is not there."""
    values: dict[str, Any] = copy.deepcopy(dict(config))
    for key, value in drawn.items():
        policy = values.get("augment", {}).get("policy")
        if key.startswith("augment.policy.") and isinstance(
            policy, str
        ):  # a preset, whose ops the key names by their places
            values["augment"]["policy"] = load_policy(policy).to_spec()
        place: Any = values
        *way, last = key.split(".")
        for part in way:
            place = _step(place, part, key)
        if isinstance(place, list):
            _step(place, last, key)
            place[int(last)] = value
        elif isinstance(place, dict):
            place[last] = value
        else:
            raise ConfigError(f"{key}: the config has {place!r} where {last!r} is looked for")
    return values


def _step(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list) and part.isdigit() and int(part) < len(place):
        return place[int(part)]
    if isinstance(place, dict) and part in place:
        if place[part] is None:  # an op without parameters
            place[part] = {}
        return place[part]
    raise ConfigError(
        f"{key}: the config has no {part!r} there; write the part of the config out that the search shall change"
    )
