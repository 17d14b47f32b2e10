"""A run's folder: made for one training, known again when it is to go on, and held by one process at a time."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.config.defaults import filled
from refract.pipeline.config.sections import TrainerConfig
from refract.pipeline.files import locked, write_atomically

log = logging.getLogger(__name__)

CONFIG, RECORD, LOCK = "config.yaml", "run.json", ".lock"


@dataclass(frozen=True)
class Run:
    """path: the folder; record: what was written when the run began, `fingerprint` of its data, `inputs` and `versions` among it, and in
    the end `finished`; resumed: whether it began before."""

    path: Path
    record: dict[str, Any]
    resumed: bool

    def finish(self) -> None:
        """Write down that all is done."""
        _write_record(self.path, {**self.record, "finished": True})


def new_run(config: Config, name: str, record: dict[str, Any]) -> Run:
    """A new folder below `runs_dir` with the config and the record. ConfigError where the named one exists: a run is never overwritten."""
    path = _new_folder(config.trainer, name)
    write_config(config, path)
    _write_record(path, record)
    return Run(path, record, resumed=False)


def write_config(config: Config, path: Path) -> None:
    """`config.yaml` in a folder, which is made if need be."""
    import yaml

    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    write_atomically(path / CONFIG, text.encode())


def stored_config(path: Path) -> Config:
    """The config that a run was begun with, its run_name and runs_dir those of where it lies now. ConfigError where there is none."""
    import yaml

    try:
        values = yaml.safe_load((path / CONFIG).read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        why = "there is no such folder" if not path.is_dir() else f"{CONFIG} cannot be read ({error})"
        raise ConfigError(f"{path} is no run: {why}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no run: {CONFIG} holds no config")
    if isinstance(optim := values.get("optim"), dict):
        optim.setdefault("head_lr", 1.0)  # runs from before that key trained all at one learning rate
    if isinstance(data := values.get("data"), dict):
        data.setdefault("color_profile", "ignore")  # runs from before that key ignored colour profiles
    config = config_from_dict(values, where=str(path / CONFIG))
    config.trainer.runs_dir, config.trainer.run_name = str(path.parent), path.name
    return config


def old_run(path: Path, record: Mapping[str, Any]) -> Run:
    """A run that goes on. record: as it would be written now. ConfigError for one that is finished, DataError where its data are others."""
    from refract.pipeline.data.manifest import DataError

    stored = read_record(path)
    if stored.get("finished"):
        raise ConfigError(f"--resume: {path} is finished already; its bundle is {path / 'bundle'}")
    if stored["fingerprint"] != record["fingerprint"]:
        raise DataError(
            f"--resume: the data of {path} have changed since it began, so it cannot go on as if it had not stopped; train anew"
        )
    for key, digest in stored.get("inputs", {}).items():
        if record["inputs"].get(key) != digest:
            raise DataError(
                f"--resume: what {key} names has changed since {path} began, so it cannot go on as if it had not stopped; train anew"
            )
    return Run(path, stored, resumed=True)


def unfinished(config: Config, name: str) -> Path | None:
    """The newest run below `runs_dir` that this config began and that is not finished."""
    root, wanted = Path(config.trainer.runs_dir), _comparable(config)
    folders = [root / config.trainer.run_name] if config.trainer.run_name else sorted(root.glob(f"{name}-*"))
    for path in sorted((p for p in folders if (p / RECORD).is_file()), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            if not read_record(path).get("finished") and _comparable(stored_config(path)) == wanted:
                return path
        except ConfigError as error:
            log.warning("passed over: %s", error)
    return None


class Held(ConfigError):
    """Another process trains the run."""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the run for this process; a process that died holds nothing. Held where another one has it."""
    with locked(path / LOCK, Held(f"{path} is being trained by another process")):
        yield


def _new_folder(config: TrainerConfig, name: str) -> Path:
    root = Path(config.runs_dir)
    wanted = config.run_name or f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 100):
        path = root / (wanted if attempt == 1 else f"{wanted}-{attempt}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError as error:
            if config.run_name or not root.is_dir():
                hint = f"; `refract train --resume {path}` goes on with it" if (path / RECORD).is_file() else ""
                raise ConfigError(
                    f"trainer.run_name: {path} exists already; choose another name or remove it{hint}"
                ) from error
        except OSError as error:
            raise ConfigError(f"trainer.runs_dir: {path} cannot be made: {error.strerror}") from error
    raise ConfigError(f"trainer.runs_dir: no free name like {wanted} in {root}")


def read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((path / RECORD).read_text("utf-8"))
        dict(record["versions"].items())
        if not isinstance(record["fingerprint"], str):
            raise ValueError("its data have no fingerprint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = "there is no such folder" if not path.is_dir() else f"{RECORD} cannot be read ({error})"
        raise ConfigError(f"{path} is no run that was begun: {why}") from error
    return record


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    write_atomically(path / RECORD, (json.dumps(dict(record), indent=1) + "\n").encode())


def _comparable(config: Config) -> dict[str, Any]:
    """What makes two configs the same training."""
    values = filled(config).to_dict()
    values["trainer"] = {k: v for k, v in values["trainer"].items() if k not in ("runs_dir", "run_name")}
    return values
