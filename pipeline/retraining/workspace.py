"""The folder in which the retraining runs of one model keep their records, and its lock: one run at a time."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.files import locked, write_atomically

RUN_RECORD = "run.json"
"""The record in a retraining run's folder."""

FORMER_RUNS, FORMER_RECORD = "nights", "night.json"
"""What earlier versions called runs/ and run.json."""

FORMER_KEYS = {"night": "run", "run": "training_run"}
"""Former key of a record → key now. `training_run` is the folder of the run of `refract train`."""

FORMER_SUMMARY = "told"
"""Former key of `summary` in the result of a check."""

FORMER_SKIPPED = "left_out"
"""Former key of `skipped` in the snapshot of a record: the number of unreadable images."""


class Check(TypedDict, total=False):
    """The result of a check of the data as JSON.

    level: none, warn or stop; summary: a sentence; file: the list of the samples. checks: each measured drift, as `effect` and `level`.
    known, changed: known samples, and those whose label changed. count, wrong, held, held_wrong, doubt, p: see
    `label_checks.Disagreement`. kinds: `from → to` of a label → number of samples, the most frequent.
    """

    level: str
    summary: str
    file: str
    checks: dict[str, "CheckedDrift"]
    known: int
    changed: int
    count: int
    wrong: int
    held: int
    held_wrong: int
    doubt: float
    p: float
    kinds: dict[str, int]


class CheckedDrift(TypedDict):
    """The effect of one kind of drift, and its level."""

    effect: float
    level: str


class Record(TypedDict, total=False):
    """The record of a retraining run (run.json). Each step adds its keys.

    begin: run, force, began, attempts (without those that a signal stopped). snapshot: snapshot (digest, holdout, task, …),
    snapshot_folder, inputs (digest of data, config and code), unchanged, start (the initial weights, see `start_from.Start`),
    label_decision (ID of the last decision of the label history that the run takes in), corrections (since the champion, see
    `label_corrections.TakenIn`).
    validate: labels (check → result), drift. train: training_run (folder of the run of `refract train`), start, label_effect (see
    `label_effect.Effect`). register: version, mlflow (address), mlflow_run. gate: champion (version or None), gate, label_effect.
    promote: undecided. announce: outcome, ended. The step that ends the run: ends (an Outcome), why.
    """

    run: str
    force: bool
    began: str
    attempts: int
    snapshot: dict[str, Any]
    snapshot_folder: str
    inputs: str
    unchanged: bool
    start: dict[str, Any]
    label_decision: int
    corrections: dict[str, Any]
    label_effect: dict[str, Any]
    labels: dict[str, Check]
    drift: Check
    training_run: str
    version: str
    mlflow: str
    mlflow_run: str
    champion: str | None
    gate: dict[str, Any]
    undecided: bool
    ends: int
    why: str
    outcome: int
    ended: str


class WorkspaceLocked(ConfigError):
    """Another process holds the workspace's lock."""


@dataclass(frozen=True)
class Workspace:
    """The folder of one registered model.

    holdout/: the frozen holdout; snapshots/DIGEST/: the data of a run; runs/NAME/: a run's record, config, gate and drift report;
    last.json: the last run whose data were accepted; lock: held by the process that runs.
    """

    root: Path

    @property
    def holdout(self) -> Path:
        return self.root / "holdout"

    def snapshot(self, digest: str) -> Path:
        return self.root / "snapshots" / digest[:16]

    def run_folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def runs(self) -> list[Path]:
        """Return the folders of all retraining runs, oldest first."""
        return sorted(path for path in (self.root / "runs").glob("*") if (path / RUN_RECORD).is_file())

    def last(self) -> Record | None:
        """Read the record of the last run whose data were accepted; None before the first one."""
        path = self.root / "last.json"
        return _with_new_keys(read(path)) if path.exists() else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock, and bring the files of an earlier version to the present layout.

        WorkspaceLocked if another process holds the lock; the lock of a process that died is free.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(
            self.root / "lock", WorkspaceLocked(f"{self.root}: another retraining run is in progress; one at a time")
        ):
            self.migrate()
            yield

    def migrate(self) -> None:
        """Rename the folder of runs and the records of an earlier version. A migration that was killed continues at the next call."""
        former, runs = self.root / FORMER_RUNS, self.root / "runs"
        if former.is_dir():
            runs.mkdir(exist_ok=True)
            for run in former.iterdir():
                if not (runs / run.name).exists():
                    run.rename(runs / run.name)
            if not any(former.iterdir()):
                former.rmdir()
        for record in runs.glob(f"*/{FORMER_RECORD}"):
            record.rename(record.parent / RUN_RECORD)


def workspace_of(config: Config) -> Workspace:
    """Return the workspace of `tracking.model_name`. ConfigError without a valid name, or with MLflow switched off."""
    if not config.tracking.enabled or not config.tracking.model_name:
        raise ConfigError(
            "retraining needs tracking.model_name, the registered model's name, and tracking.enabled; "
            "add --tracking.model_name NAME"
        )
    if re.search(r"[/:\\\0]", config.tracking.model_name) or config.tracking.model_name in (".", ".."):
        raise ConfigError(
            rf"tracking.model_name: {config.tracking.model_name!r}: MLflow accepts no /, \ or : in a model's name, and no . or .. alone"
        )
    return Workspace(Path(config.retrain.folder) / config.tracking.model_name)


def read(path: Path) -> dict[str, Any]:
    """Read a JSON object. ConfigError if the file cannot be read or holds another value."""
    try:
        record = json.loads(path.read_text("utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    return record


def read_run(folder: Path) -> Record:
    """Read the record of a retraining run, also one of an earlier version. ConfigError as `read`."""
    return _with_new_keys(read(folder / RUN_RECORD))


def write_run(folder: Path, record: Record) -> None:
    """Write the record of a retraining run. OSError if that fails."""
    write(folder / RUN_RECORD, record)


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Replace the file by a JSON object. OSError if that fails."""
    write_atomically(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def _with_new_keys(record: dict[str, Any]) -> Record:
    """Return the record under the present keys. Versions before `run.json` are recognised by their key of the run's name."""
    if "night" in record:
        record = {FORMER_KEYS.get(key, key): value for key, value in record.items()}
    checks = [*record.get("labels", {}).values(), record.get("drift") or {}, *record.get("gate", {}).get("lines", ())]
    for check in checks:
        if FORMER_SUMMARY in check:
            check["summary"] = check.pop(FORMER_SUMMARY)
    snapshot = record.get("snapshot") or {}
    if FORMER_SKIPPED in snapshot:
        snapshot["skipped"] = snapshot.pop(FORMER_SKIPPED)
    return cast(Record, record)
