"""A retraining run: its folder with its config and its record, and whether an unfinished one is resumed."""

from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.config.plugin_files import absolute_paths, plugin_digests
from refract.pipeline.retraining.workspace import Workspace, read_run, workspace_of, write_run

ATTEMPTS = 3
"""Attempts after which `--resume-or-begin` starts a new run: repeating does not cure a run that keeps failing."""


def begin(config: Config, *, force: bool) -> Path:
    """Make the folder of a new run, with its config and record, and return it. force: train even if nothing has changed."""
    from refract.pipeline.training.run_directory import write_config

    if config.trainer.folds:
        raise ConfigError(
            f"trainer.folds: {config.trainer.folds}, but a retraining run trains one model; set trainer.folds: 0"
        )
    workspace, now = workspace_of(config), datetime.now(UTC)
    workspace.migrate()
    for attempt in range(100):
        folder = workspace.run_folder(f"{now:%Y%m%d-%H%M%S}-{attempt:02}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
    write_config(config, folder)
    write_run(folder, {"run": folder.name, "force": force, "began": now.isoformat(timespec="seconds")})
    return folder


def unfinished(workspace: Workspace) -> Path | None:
    """Return the newest run's folder if it has no outcome."""
    runs = workspace.runs()
    return runs[-1] if runs and "outcome" not in read_run(runs[-1]) else None


def worth_resuming(folder: Path, config: Config) -> bool:
    """Whether an unfinished run has this config and had less than ATTEMPTS attempts, so that resuming it may finish it."""
    same = [each.to_dict() | {"plugins": plugin_digests(each.plugins)} for each in (run_config(folder), config)]
    return read_run(folder).get("attempts", 0) < ATTEMPTS and same[0] == same[1]


def note_stop(folder: Path) -> None:
    """Do not count the last attempt: a signal stopped it, so that it did not fail."""
    record = read_run(folder)
    write_run(folder, {**record, "attempts": record.get("attempts", 1) - 1})


def run_config(folder: Path) -> Config:
    """Read the config of a run, whose plugins are the copies in its folder."""
    path = folder / "config.yaml"
    config = _parsed(path.read_text("utf-8"), str(path))
    return replace(config, plugins=absolute_paths(config.plugins, folder))


@lru_cache(maxsize=2)
def _parsed(text: str, where: str) -> Config:
    """Parse a run's config. Each step of the run needs it, and parsing takes a fifth of a second."""
    import yaml

    return config_from_dict(yaml.safe_load(text), where=where)
