"""The folder of a run: created for one training, found again to resume it, and locked by one process at a time."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.config.defaults import filled
from refract.pipeline.config.plugin_files import absolute_paths, plugin_digests, store_plugins
from refract.pipeline.config.sections import TrainerConfig
from refract.pipeline.files import locked, write_atomically
from refract.pipeline.labels.address import split_address
from refract.plugins import PluginError

log = logging.getLogger(__name__)

CONFIG, RECORD, LOCK = "config.yaml", "run.json", ".lock"


@dataclass(frozen=True)
class Run:
    """A run on disk.

    path: the folder; record: its `run.json`, with the `fingerprint` of the data, `inputs`, `versions`, `start` (see `SourceModel.record`)
    if the training starts from a model, `timed_input` if `data.decode_on: auto` chose the input path, and, at the end, `finished`;
    resumed: whether an earlier process started the run.
    """

    path: Path
    record: dict[str, Any]
    resumed: bool

    def finish(self) -> None:
        """Mark the run as finished in its record."""
        _write_record(self.path, {**self.record, "finished": True})


def new_run(config: Config, name: str, record: dict[str, Any]) -> Run:
    """Create a folder in `runs_dir` with the config and the record.

    Raises ConfigError if the folder of `run_name` exists: a run is never overwritten.
    """
    path = _new_folder(config.trainer, name)
    write_config(config, path)
    _write_record(path, record)
    return Run(path, record, resumed=False)


def write_config(config: Config, path: Path) -> None:
    """Write `config.yaml`, and copies of the plugins' files that it names, to a folder, which is created if necessary."""
    import yaml

    values = config.to_dict()
    if config.plugins:
        values["plugins"] = store_plugins(config.plugins, path)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_atomically(path / CONFIG, text.encode())


def stored_config(path: Path) -> Config:
    """Read the config of a run, with the run_name and runs_dir of its current location. Raises ConfigError if there is none."""
    import yaml

    try:
        values = yaml.safe_load((path / CONFIG).read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = "there is no such folder" if not path.is_dir() else f"{CONFIG} cannot be read ({error})"
        raise ConfigError(f"{path} is not a run: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a run: {CONFIG} is not a config")
    if isinstance(optim := values.get("optim"), dict):
        optim.setdefault("head_lr", 1.0)  # runs without this key trained all parameters at one learning rate
    if isinstance(data := values.get("data"), dict):
        data.setdefault("color_profile", "ignore")  # runs without this key ignored colour profiles
    config = config_from_dict(values, where=str(path / CONFIG))
    config = config.changed({"trainer.runs_dir": str(path.parent), "trainer.run_name": path.name})
    return replace(config, plugins=absolute_paths(config.plugins, path))


def resume_run(path: Path, record: Mapping[str, Any]) -> Run:
    """Open an unfinished run to resume it. record: the one that a new run would write now.

    Raises ConfigError if the run is finished, DataChanged if its data or an input file changed.
    """
    from refract.pipeline.data.errors import DataChanged

    stored = read_record(path)
    if stored.get("finished"):
        bundle = f"; its bundle is {path / 'bundle'}" if (path / "bundle").exists() else ""
        raise ConfigError(f"--resume: {path} is finished already{bundle}")
    if stored["fingerprint"] != record["fingerprint"]:
        raise DataChanged(
            f"--resume: the data of {path} have changed since it started, so the result would not be reproducible; "
            "start a new run without --resume"
        )
    for key, digest in stored.get("inputs", {}).items():
        if record["inputs"].get(key) != digest:
            raise DataChanged(
                f"--resume: the file of {key} has changed since {path} started, so the result would not be reproducible; "
                "start a new run without --resume"
            )
    return Run(path, stored, resumed=True)


def source_digest(path: Path) -> str | None:
    """Return the digest of the bundle that a run started from; None for other weights. ConfigError without a record."""
    return read_record(path).get("start", {}).get("digest")


def ranks_before(path: Path) -> int | None:
    """Return the number of ranks with which a run started; None for a run of an earlier version. ConfigError without a record."""
    return read_record(path).get("ranks")


def unfinished(config: Config, name: str) -> Path | None:
    """Return the newest unfinished run in `runs_dir` with the same config, or None."""
    root, comparable = Path(config.trainer.runs_dir), _comparable(config)
    folders = [root / config.trainer.run_name] if config.trainer.run_name else sorted(root.glob(f"{name}-*"))
    for path in sorted((p for p in folders if (p / RECORD).is_file()), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            record, stored = read_record(path), stored_config(path)
            if source := record.get("start", {}).get("source"):  # with its alias, where the stored config has a version
                stored = stored.changed({"model.weights": source})
            if (
                config.model.unfreeze_epochs is None and stored.model.unfreeze_epochs == 1
            ):  # the network cannot have a fitted head
                stored = stored.changed({"model.unfreeze_epochs": None})
            address, decision = split_address(config.data.labels)
            if (
                decision is None and split_address(stored.data.labels)[0] == address
            ):  # the stored config has the last decision
                stored = stored.changed({"data.labels": address})
            if config.data.decode_on == "auto" and record.get("timed_input"):  # the stored config has the faster path
                stored = stored.changed({"data.decode_on": "auto"})
            if not record.get("finished") and _comparable(stored) == comparable:
                return path
        except (ConfigError, PluginError) as error:
            log.warning("skipped: %s", error)
    return None


class RunLocked(ConfigError):
    """Another process trains the run."""


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Lock the run for this process. A process that died holds no lock. Raises RunLocked if another process has the lock."""
    with locked(path / LOCK, RunLocked(f"{path} is being trained by another process")):
        yield


def check_name_is_free(config: TrainerConfig) -> None:
    """Raise ConfigError if the folder of `run_name` exists."""
    if config.run_name and (path := Path(config.runs_dir) / config.run_name).exists():
        raise _exists(path)


def _exists(path: Path) -> ConfigError:
    hint = f"; `refract train --resume {path}` resumes it" if (path / RECORD).is_file() else ""
    return ConfigError(f"trainer.run_name: {path} exists already; choose another name or remove it{hint}")


def _new_folder(config: TrainerConfig, name: str) -> Path:
    root = Path(config.runs_dir)
    folder_name = config.run_name or f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 100):
        path = root / (folder_name if attempt == 1 else f"{folder_name}-{attempt}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError as error:
            if config.run_name or not root.is_dir():
                raise _exists(path) from error
        except OSError as error:
            raise ConfigError(f"trainer.runs_dir: {path} cannot be created: {error.strerror}") from error
    raise ConfigError(f"trainer.runs_dir: {root} has no free name like {folder_name}")


def read_record(path: Path) -> dict[str, Any]:
    """Read the record of a run. Raises ConfigError if there is none or it is damaged."""
    try:
        record: dict[str, Any] = json.loads((path / RECORD).read_text("utf-8"))
        dict(record["versions"].items())
        if not isinstance(record["fingerprint"], str):
            raise ValueError("it has no fingerprint of the data")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "there is no such folder" if not path.is_dir() else f"{RECORD} cannot be read ({error})"
        raise ConfigError(f"{path} is not a started run: {reason}") from error
    return record


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    write_atomically(path / RECORD, (json.dumps(dict(record), indent=1) + "\n").encode())


def _comparable(config: Config) -> dict[str, Any]:
    """Return the values that are equal in two configs of the same training."""
    values = filled(config).to_dict()
    values["trainer"] = {k: v for k, v in values["trainer"].items() if k not in ("runs_dir", "run_name", "copy_to")}
    return values | {"plugins": plugin_digests(config.plugins)}
