"""Config keys that have a new name: configs, bundles and runs of earlier versions stay readable."""

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
"""Former key → its name now, within the same section."""

log = logging.getLogger(__name__)


def with_new_keys(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a config under their present keys; warns of each former key. ValueError where a key stands under both names."""
    renamed = dict(values)
    for old, new in RENAMED.items():
        section, old_key = old.split(".")
        new_key = new.split(".")[1]
        found = renamed.get(section)
        if not isinstance(found, Mapping) or old_key not in found:
            continue
        if new_key in found:
            raise ValueError(f"{where}: {old} is the former name of {new}; remove {old}")
        _warn(where, old, new)
        renamed[section] = {new_key if key == old_key else key: value for key, value in found.items()}
    return renamed


def with_new_options(overrides: Sequence[str]) -> list[str]:
    """Command line options such as `--data.val_share 0.1` or `--data.val_share=0.1` under their present keys; warns of former ones."""
    renamed = []
    for option in overrides:
        key, equals, value = option.removeprefix("--").partition("=")
        if option.startswith("--") and key in RENAMED:
            _warn("command line", key, RENAMED[key])
            option = f"--{RENAMED[key]}{equals}{value}"
        renamed.append(option)
    return renamed


def _warn(where: str, old: str, new: str) -> None:
    log.warning("%s: %s is deprecated; write %s", where, old, new)
