"""The schedule store: the schedules and the results of their runs, in one SQLite file.

APScheduler's own store has pickled jobs, and unpickling runs code from anyone who can write the file. This one has plain columns;
APScheduler has its one job in memory, and gets its next time from here at each start.
"""

import hashlib
import json
import signal
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from refract.errors import ServiceError
from refract.pipeline.files import locked

FILE = "schedule.db"
LOCAL = "local"
"""The name of the machine's time zone if it has none."""
RESULTS = {
    0: "promoted, or nothing had changed",
    2: "its config cannot be used, or another run of the model is in progress",
    10: "trained, not promoted",
    20: "data refused",
    30: "failed",
    75: "stopped",
    130: "interrupted",
}
"""Exit code of `refract retrain` → its meaning."""

DECIDED = (0, 10, 20)
"""Exit codes of runs that cannot be resumed."""

_TABLES = """
CREATE TABLE IF NOT EXISTS schedules (config TEXT PRIMARY KEY, cron TEXT, zone TEXT, command TEXT, due TEXT, process INTEGER);
CREATE TABLE IF NOT EXISTS runs (id INTEGER PRIMARY KEY, config TEXT, began TEXT, ended TEXT, code INTEGER, state TEXT, log TEXT);
CREATE TABLE IF NOT EXISTS triggers
    (config TEXT, name TEXT, argument TEXT, handled TEXT, reading TEXT, checked TEXT, PRIMARY KEY (config, name));
CREATE TABLE IF NOT EXISTS starts (run INTEGER PRIMARY KEY, config TEXT, reason TEXT, marks TEXT);
"""
NO_MARKS: Mapping[str, str] = MappingProxyType({})


class ScheduleError(ServiceError):
    """The store's file cannot be used. The message says which and why."""


class Taken(ScheduleError):
    """Another process holds the lock."""


@dataclass(frozen=True)
class Schedule:
    """cron: empty without one; command: runs instead of `refract retrain`, or empty; due: time of the next run by cron; process: ID of the
    scheduler's process, perhaps ended."""

    config: str
    cron: str
    zone: str
    command: str
    due: datetime | None
    process: int | None


@dataclass(frozen=True)
class Run:
    """state: running, ended, stopped (with its scheduler), cut (killed with its scheduler), or unseen (it ended without a scheduler).

    reason: why it started, empty in runs of earlier versions; marks: trigger → the state that the run takes in.
    """

    id: int
    began: datetime
    ended: datetime | None
    code: int | None
    state: str
    log: str
    reason: str = ""
    marks: Mapping[str, str] = field(default_factory=dict, hash=False)

    def words(self, *, is_retrain: bool = True) -> str:
        """Describe the result. is_retrain: whether the command is `refract retrain`, whose exit codes have a meaning."""
        if self.state in ("running", "cut", "unseen"):
            return {"running": "in progress", "cut": "interrupted", "unseen": "ended without a scheduler"}[self.state]
        if self.code is None:
            return "stopped before its start" if self.state == "stopped" else "could not be started"
        if self.code < 0:
            killed = f"ended by {signal.Signals(-self.code).name}"
            return f"{killed}, with its scheduler" if self.state == "stopped" else killed
        meaning = RESULTS.get(self.code) if is_retrain else {0: "done"}.get(self.code)
        return f"{meaning} (exit code {self.code})" if meaning else f"exit code {self.code}"


@dataclass(frozen=True)
class Reading:
    """The result of one check of a trigger.

    summary: the result as text; value, threshold: the measured number and the one that starts a run, None if not measured; due: whether a
    run should start; handled: the new value of `TriggerState.handled`, None to keep it; mark: the value that it gets when a run that starts
    now ends with a decision, None to keep it; state: further values as JSON, for the next check.
    """

    summary: str
    value: float | None = None
    threshold: float | None = None
    due: bool = False
    handled: str | None = None
    mark: str | None = None
    state: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def failed(self) -> bool:
        return self.value is None


@dataclass(frozen=True)
class TriggerState:
    """argument: the value of the trigger's option; handled: what the last run with a decision took in; reading, checked: the last check."""

    name: str
    argument: str
    handled: str
    reading: Reading | None
    checked: datetime | None


class ScheduleStore:
    """The SQLite file in `folder`, which is created. Each call is one transaction, so that several schedulers can write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            database.executescript(_TABLES)

    def schedules(self) -> list[Schedule]:
        with self._open() as database:
            rows = database.execute("SELECT config, cron, zone, command, due, process FROM schedules ORDER BY config")
            return [Schedule(config, cron, zone, run, _time(due), pid) for config, cron, zone, run, due, pid in rows]

    def write(self, schedule: Schedule) -> None:
        values = (
            schedule.config,
            schedule.cron,
            schedule.zone,
            schedule.command,
            _text(schedule.due),
            schedule.process,
        )
        with self._open() as database:
            database.execute("INSERT OR REPLACE INTO schedules VALUES (?, ?, ?, ?, ?, ?)", values)

    def forget(self, config: str) -> None:
        """Delete the schedule, its triggers and its runs, but not their logs."""
        with self._open() as database:
            for table in ("schedules", "runs", "triggers", "starts"):
                database.execute(f"DELETE FROM {table} WHERE config = ?", [config])

    def set_triggers(self, config: str, arguments: Mapping[str, str]) -> None:
        """Replace the triggers of a config. arguments: name → value of its option.

        The labels that a run took in stay known when N changes; drift of other data is new.
        """
        with self._open() as database:
            names = [row[0] for row in database.execute("SELECT name FROM triggers WHERE config = ?", [config])]
            for name in set(names) - set(arguments):
                database.execute("DELETE FROM triggers WHERE config = ? AND name = ?", [config, name])
            for name, argument in arguments.items():
                database.execute(
                    "INSERT INTO triggers (config, name, argument, handled) VALUES (?, ?, ?, '') ON CONFLICT (config, name) "
                    "DO UPDATE SET reading = CASE argument WHEN excluded.argument THEN reading END, "
                    "handled = CASE WHEN argument = excluded.argument OR name = 'labels' THEN handled ELSE '' END, "
                    "argument = excluded.argument",
                    [config, name, argument],
                )

    def triggers(self, config: str) -> list[TriggerState]:
        """Return the triggers of a config, by name."""
        with self._open() as database:
            rows = database.execute(
                "SELECT name, argument, handled, reading, checked FROM triggers WHERE config = ? ORDER BY name DESC",
                [config],
            )
            return [
                TriggerState(
                    name, argument, handled, Reading(**json.loads(reading)) if reading else None, _time(checked)
                )
                for name, argument, handled, reading, checked in rows
            ]

    def trigger(self, config: str, name: str) -> TriggerState | None:
        return next((one for one in self.triggers(config) if one.name == name), None)

    def record_reading(self, config: str, name: str, reading: Reading, time: datetime, before: str) -> None:
        """Store the result of a check of a trigger. before: `handled` at its start, which a run that ended meanwhile may have replaced."""
        with self._open() as database:
            database.execute(
                "UPDATE triggers SET reading = ?, checked = ?, "
                "handled = CASE handled WHEN ? THEN coalesce(?, handled) ELSE handled END WHERE config = ? AND name = ?",
                [json.dumps(asdict(reading)), _text(time), before, reading.handled, config, name],
            )

    def marks(self, config: str) -> dict[str, str]:
        """Return trigger → the state that a run takes in if it starts now."""
        readings = {one.name: one.reading for one in self.triggers(config)}
        return {name: reading.mark for name, reading in readings.items() if reading and reading.mark is not None}

    def is_due(self, config: str, due: datetime | None) -> None:
        with self._open() as database:
            database.execute("UPDATE schedules SET due = ? WHERE config = ?", [_text(due), config])

    def runs(self, config: str, count: int) -> list[Run]:
        """Return the last `count` runs, newest first."""
        with self._open() as database:
            rows = database.execute(
                "SELECT id, began, ended, code, state, log, coalesce(reason, ''), coalesce(marks, '{}') "
                "FROM runs LEFT JOIN starts ON run = id WHERE runs.config = ? ORDER BY id DESC LIMIT ?",
                [config, count],
            )
            return [
                Run(number, datetime.fromisoformat(began), _time(ended), code, state, log, reason, json.loads(marks))
                for number, began, ended, code, state, log, reason, marks in rows
            ]

    def begin(self, config: str, log: Path, keep: int, *, reason: str = "", marks: Mapping[str, str] = NO_MARKS) -> int:
        """Add a run and return its number. Of the config's runs the newest `keep` stay, with their logs. reason, marks: as in `Run`."""
        with self._open() as database:
            old = database.execute(
                "SELECT id, log FROM runs WHERE config = ? ORDER BY id DESC LIMIT -1 OFFSET ?", [config, keep - 1]
            ).fetchall()
            for number, path in old:
                database.execute("DELETE FROM runs WHERE id = ?", [number])
                database.execute("DELETE FROM starts WHERE run = ?", [number])
                Path(path).unlink(missing_ok=True)
            done = database.execute(
                "INSERT INTO runs (config, began, state, log) VALUES (?, ?, 'running', ?)",
                [config, _text(datetime.now(UTC)), str(log)],
            )
            assert done.lastrowid is not None
            database.execute(
                "INSERT OR REPLACE INTO starts VALUES (?, ?, ?, ?)",
                [done.lastrowid, config, reason, json.dumps(dict(marks))],
            )
            return done.lastrowid

    def end(self, number: int, state: str, code: int | None) -> None:
        """Record the end of a run. A run with a decision, or with an unknown end, has taken in what its triggers had measured."""
        with self._open() as database:
            values = [_text(datetime.now(UTC)), code, state, number]
            database.execute("UPDATE runs SET ended = ?, code = ?, state = ? WHERE id = ?", values)
            if state == "unseen" or (state == "ended" and code in DECIDED):
                start = database.execute("SELECT config, marks FROM starts WHERE run = ?", [number]).fetchone()
                for name, mark in json.loads(start[1]).items() if start else ():
                    database.execute(
                        "UPDATE triggers SET handled = ? WHERE config = ? AND name = ?", [mark, start[0], name]
                    )

    def cut(self, number: int) -> None:
        """Record that the run was interrupted, at an unknown time."""
        with self._open() as database:
            database.execute("UPDATE runs SET state = 'cut' WHERE id = ?", [number])

    def lock(self, config: str, holder: str) -> Path:
        """Return the lock file of a config. holder: `scheduler` or `run`."""
        return self.folder / f"{Path(config).stem}-{hashlib.sha256(config.encode()).hexdigest()[:8]}.{holder}.lock"

    def alive(self, config: str, holder: str) -> bool:
        """Whether a process holds the lock. holder: `scheduler` or `run`."""
        path = self.lock(config, holder)
        if not path.exists():
            return False
        try:
            with locked(path, Taken()):
                return False
        except Taken:
            return True

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        path = self.folder / FILE
        try:
            with closing(sqlite3.connect(path, timeout=30)) as database, database:
                yield database
        except sqlite3.Error as error:
            raise ScheduleError(f"{path} cannot be used: {error}; check the file and its permissions") from error


def _text(time: datetime | None) -> str | None:
    return time.astimezone(UTC).isoformat() if time else None


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
