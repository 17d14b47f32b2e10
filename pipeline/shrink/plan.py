"""The plan of a shrink: its bundle, data and candidates, stored in its folder, so that the same command resumes it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refract.models.bundle.bundle import Bundle
from refract.pipeline.config.config import Config, config_from_dict
from refract.pipeline.data.manifest import DataError, Manifest
from refract.pipeline.files import write_atomically
from refract.pipeline.shrink.candidates import Candidate, ShrinkError, default_candidates, named_candidates

PLAN, RESULT, LOCK = "plan.json", "shrink.json", ".lock"

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """What a shrink trains. digest: of the bundle; fingerprint: of the data with its splits; networks: as named by the user."""

    digest: str
    source: str
    fingerprint: str
    networks: tuple[str, ...]
    candidates: tuple[Candidate, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "format_version": FORMAT_VERSION, "bundle": self.digest, "source": self.source, "fingerprint": self.fingerprint,
            "networks": list(self.networks), "candidates": [candidate.to_dict() for candidate in self.candidates],
        }  # fmt: skip


def config_of_bundle(bundle: Bundle, source: str | None, plugins: Sequence[str] = ()) -> Config:
    """Return the config that trained the bundle, with the data at `source` if it is not None. ShrinkError if it cannot be used."""
    info = bundle.info
    if info.text is not None:
        raise ShrinkError(
            f"{bundle.path}: reads texts, and shrink has smaller networks for images only; train a smaller one with "
            "loss.teacher set to this bundle"
        )
    if not info.config:
        raise ShrinkError(
            f"{bundle.path}: has no config, so its data and recipe are unknown; train a network with loss.teacher set to this bundle"
        )
    config = config_from_dict(info.config, where=f"{bundle.path}: its config")
    if source is not None:
        config = config.changed({"data.source": source})
    return replace(config, plugins=tuple(plugins)) if plugins else config


def prepare(bundle: Bundle, config: Config) -> tuple[Manifest, dict[str, str]]:
    """Return the data, split as in the bundle's training. ShrinkError if they are not the same."""
    from refract.pipeline.data.prepare import prepare_data

    try:
        manifest, identity = prepare_data(config)
    except DataError as err:
        raise ShrinkError(
            f"{bundle.path}: its training data cannot be used: {err}; name their present place by --data"
        ) from err
    if identity["fingerprint"] != bundle.info.data.get("fingerprint"):
        raise ShrinkError(
            f"{manifest.source}: is not the data that {bundle.path} was trained on, or has changed since, so its test images cannot be "
            "identified; name the splits.csv of its run by --data"
        )
    return manifest, identity


def check_folder(folder: Path) -> None:
    """Raise ShrinkError unless the folder is new, empty, or that of a shrink."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ShrinkError(f"-o {folder}: is not a folder; name a new or an empty one")
    if folder.exists() and not (folder / PLAN).exists() and any(file.name != LOCK for file in folder.iterdir()):
        raise ShrinkError(f"-o {folder}: has other files already; name a new or an empty folder")


def open_plan(folder: Path, bundle: Bundle, config: Config, networks: Sequence[str], fingerprint: str) -> Plan:
    """Read the plan of the folder, or write one. ShrinkError for the plan of another shrink."""
    source = config.data.source
    if not (folder / PLAN).exists():
        model = config.model
        candidates = named_candidates(bundle, model, networks) if networks else default_candidates(bundle, model)
        plan = Plan(bundle.digest, source, fingerprint, tuple(networks), tuple(candidates))
        write_atomically(folder / PLAN, (json.dumps(plan.to_dict(), indent=1) + "\n").encode())
        return plan
    stored = _read(folder / PLAN)
    asked = {"bundle": bundle.digest, "source": source, "fingerprint": fingerprint, "networks": list(networks)}
    for key, value in asked.items():
        if stored[key] != value:
            shown = f": {stored[key]} there, {value} here" if key != "fingerprint" else ""
            raise ShrinkError(
                f"-o {folder}: has another shrink, which differs in {_WORDS[key]}{shown}; name a new folder, or repeat the first command"
            )
    candidates = [Candidate.from_dict(values) for values in stored["candidates"]]
    return Plan(bundle.digest, source, fingerprint, tuple(networks), tuple(candidates))


_WORDS = {
    "bundle": "the bundle's digest",
    "source": "the data",
    "fingerprint": "the content of the data",
    "networks": "--networks",
}


def _read(path: Path) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if stored["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {stored['format_version']}, expected {FORMAT_VERSION}")
        for key in (*_WORDS, "candidates"):
            stored[key]
        [Candidate.from_dict(values) for values in stored["candidates"]]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ShrinkError(f"{path}: is not a plan of refract shrink ({err}); name a new folder") from err
    return stored
