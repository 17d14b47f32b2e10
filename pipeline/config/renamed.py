"""Former names of config keys and values, so that configs, bundles and runs of earlier versions stay readable."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

RENAMED = {
    "data.val_share": "data.val_fraction",
    "data.test_share": "data.test_fraction",
    "text.drop_picture": "text.drop_image",
    "trainer.recompute": "trainer.gradient_checkpointing",
    "retrain.tell": "retrain.notify",
}
"""Former key → present key, in the same section."""

RENAMED_VALUES = {"retrain.drift": {"tell": "warn"}}
"""Key → {former value: present value}."""

log = logging.getLogger(__name__)


def with_new_keys(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of a config under their present names; log a warning for each former name.

    Raises ValueError if a key is given under both names.
    """
    renamed = dict(values)
    for old, new in RENAMED.items():
        section, old_key = old.split(".")
        new_key = new.split(".")[1]
        values_of_section = renamed.get(section)
        if not isinstance(values_of_section, Mapping) or old_key not in values_of_section:
            continue
        if new_key in values_of_section:
            raise ValueError(f"{where}: {old} is the former name of {new}; remove {old}")
        _warn(where, old, new)
        renamed[section] = {new_key if key == old_key else key: value for key, value in values_of_section.items()}
    for option, new_values in RENAMED_VALUES.items():
        section, key = option.split(".")
        values_of_section = renamed.get(section)
        if isinstance(values_of_section, Mapping) and values_of_section.get(key) in list(new_values):
            renamed[section] = {**values_of_section, key: _new_value(where, option, values_of_section[key])}
    return renamed


def with_new_options(overrides: Sequence[str]) -> list[str]:
    """Return command line options such as `--data.val_share 0.1` or `--data.val_share=0.1` under their present names.

    Logs a warning for each former name. Raises ValueError if a key is given under both names.
    """
    given = {option[2:].partition("=")[0] for option in overrides if option.startswith("--")}
    for old, new in RENAMED.items():
        if {old, new} <= given:
            raise ValueError(f"command line: --{old} is the former name of --{new}; remove --{old}")
    renamed: list[str] = []
    for option in overrides:
        key, equals, value = option.removeprefix("--").partition("=")
        if option.startswith("--") and key in RENAMED:
            _warn("command line", key, RENAMED[key])
            option = f"--{RENAMED[key]}{equals}{value}"
        elif option.startswith("--") and equals and value in RENAMED_VALUES.get(key, ()):
            option = f"--{key}={_new_value('command line', key, value)}"
        elif renamed and option in RENAMED_VALUES.get(renamed[-1].removeprefix("--"), ()):
            option = _new_value("command line", renamed[-1].removeprefix("--"), option)
        renamed.append(option)
    return renamed


def present_key(key: str, where: str) -> str:
    """Return the present name of a dotted key; log a warning for a former name."""
    if key in RENAMED:
        _warn(where, key, RENAMED[key])
    return RENAMED.get(key, key)


def _new_value(where: str, key: str, old: str) -> str:
    new = RENAMED_VALUES[key][old]
    _warn(where, f"{key}: {old}", f"{key}: {new}")
    return new


def _warn(where: str, old: str, new: str) -> None:
    log.warning("%s: %s is deprecated; write %s", where, old, new)
