"""The search space: dotted config keys with their possible values, read from YAML.

    optim.lr: {low: 1e-4, high: 1e-1, log: true}
    optim.name: [adamw, sgd]
    optim.momentum: {low: 0.8, high: 0.99, when: {optim.name: sgd}}
    augment.policy.0.RandAugment.magnitude: {low: 1, high: 10, whole: true}

A number in a key is a list index, so that the ops of a policy and their parameters can be searched too.
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
from refract.pipeline.config.renamed import present_key


@dataclass(frozen=True)
class Dimension:
    """The values of one key: `choices`, or without them a number from low to high, both included.

    log: draw uniformly in the logarithm; whole: integers only; when: other keys of the space with the value that they must have for this
    key to apply.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    when: tuple[tuple[str, Any], ...] = ()


def read_space(path: Path) -> list[Dimension]:
    """Read a search space. ConfigError names the invalid key."""
    import yaml

    from refract.augment.yaml_text import read_yaml

    try:
        values = read_yaml(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, Mapping) or not values:
        raise ConfigError(
            f"{path}: expected config keys with their values, such as optim.lr: {{low: 1e-4, high: 1e-1, log: true}}"
        )
    space = [_dimension(present_key(str(key), str(path)), value, str(path)) for key, value in values.items()]
    choices_of: dict[str, tuple[Any, ...]] = {}
    for dimension in space:
        for other, value in dimension.when:
            if other not in choices_of:
                raise ConfigError(f"{path}: {dimension.key}: when: {other!r} is not an earlier key of the space")
            if value not in choices_of[other]:
                raise ConfigError(f"{path}: {dimension.key}: when: {value!r} is not a choice of {other}")
        choices_of[dimension.key] = dimension.choices
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
    if isinstance(when, Mapping):
        when = {present_key(str(name), where): _number(wanted) for name, wanted in when.items()}
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
        raise ConfigError(f"{where}: {key}: {value!r}: whole needs integers for low and high")
    return Dimension(key, low=low, high=high, log=log, whole=whole, when=tuple(when.items()))


def _number(value: Any) -> Any:
    """Convert numbers such as 1e-4, which YAML reads as strings."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def applies(dimension: Dimension, drawn: Mapping[str, Any]) -> bool:
    """Whether the dimension's conditions hold for the values drawn before it."""
    return all(drawn.get(other) == value for other, value in dimension.when)


def with_values(config: Mapping[str, Any], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config's values with the drawn values set. ConfigError for a key that the config does not contain."""
    values: dict[str, Any] = copy.deepcopy(dict(config))
    for key, value in drawn.items():
        policy = values.get("augment", {}).get("policy")
        if key.startswith("augment.policy.") and isinstance(policy, str):  # a preset, whose ops the key names by index
            values["augment"]["policy"] = load_policy(policy).to_spec()
        node: Any = values
        *parents, last = key.split(".")
        for part in parents:
            node = _step(node, part, key)
        if isinstance(node, list):
            _step(node, last, key)
            node[int(last)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise ConfigError(f"{key}: the config has {node!r} in the place of {last!r}")
    return values


def _step(node: Any, part: str, key: str) -> Any:
    """Return the child `part` of a list or mapping. ConfigError, which names `key`, if it is missing."""
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return node[int(part)]
    if isinstance(node, dict) and part in node:
        if node[part] is None:  # an op without parameters
            node[part] = {}
        return node[part]
    raise ConfigError(f"{key}: the config has no {part!r} there; write this part of the config explicitly")
