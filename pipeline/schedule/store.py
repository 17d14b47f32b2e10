"""What schedules there are and what became of their runs, in one SQLite file.

APScheduler's own store keeps pickled jobs, and loading those runs what whoever can write the file put in. Here are plain columns;
APScheduler keeps its one job in memory and is told at each start when it is due.
"""

import hashlib
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from refract.pipeline.files import locked

FILE = "schedule.db"
LOCAL = "local"
"""How the machine's own time zone is called where it has no name."""
RESULTS = {
    0: "promoted, or nothing had changed",
    2: "its config cannot be used, or another night of the model is under way",
    10: "trained, not promoted",
    20: "data refused",
    30: "failed",
    75: "stopped",
    130: "interrupted",
}
"""What the exit codes of `refract retrain` mean, and of another --command those of a process that was asked to stop."""

DECIDED = (0, 10, 20)
"""Exit codes after which there is nothing left to go on with."""

_TABLES = """
CREATE TABLE IF NOT EXISTS schedules (config TEXT PRIMARY KEY, cron TEXT, zone TEXT, command TEXT, due TEXT, process INTEGER);
CREATE TABLE IF NOT EXISTS runs (id INTEGER PRIMARY KEY, config TEXT, began TEXT, ended TEXT, code INTEGER, state TEXT, log TEXT);
"""


class ScheduleError(RuntimeError):
    """The schedule's file cannot be used; the message says which and why."""


class Taken(ScheduleError):
    """Another process holds what was to be held."""


@dataclass(frozen=True)
class Schedule:
    """command: started instead of `refract retrain`, or empty; due: when next; process: the scheduler's, perhaps of the last one."""

    config: str
    cron: str
    zone: str
    command: str
    due: datetime | None
    process: int | None


@dataclass(frozen=True)
class Run:
    """state: running, ended, stopped (with its scheduler), cut (its scheduler ended and it too), unseen (it ended, without a scheduler)."""

    id: int
    began: datetime
    ended: datetime | None
    code: int | None
    state: str
    log: str

    def words(self, *, own: bool = True) -> str:
        """What became of it. own: whether it was `refract retrain`, whose exit codes are known."""
        if self.state in ("running", "cut", "unseen"):
            return {"running": "under way", "cut": "cut short", "unseen": "ended while no scheduler watched"}[
                self.state
            ]
        if self.code is None:
            return "stopped before it began" if self.state == "stopped" else "could not be started"
        if self.code < 0:
            killed = f"ended by {signal.Signals(-self.code).name}"
            return f"{killed}, with its scheduler" if self.state == "stopped" else killed
        known = RESULTS.get(self.code) if own else {0: "done"}.get(self.code)
        return f"{known} (exit code {self.code})" if known else f"exit code {self.code}"


class ScheduleStore:
    """The file in `folder`, which is made. Each call is a transaction of its own: several schedulers may write."""

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
        """Leave the schedule and its runs out from now on; their logs stay."""
        with self._open() as database:
            database.execute("DELETE FROM schedules WHERE config = ?", [config])
            database.execute("DELETE FROM runs WHERE config = ?", [config])

    def is_due(self, config: str, due: datetime | None) -> None:
        with self._open() as database:
            database.execute("UPDATE schedules SET due = ? WHERE config = ?", [_text(due), config])

    def runs(self, config: str, count: int) -> list[Run]:
        """The newest first."""
        with self._open() as database:
            rows = database.execute(
                "SELECT id, began, ended, code, state, log FROM runs WHERE config = ? ORDER BY id DESC LIMIT ?",
                [config, count],
            )
            return [Run(row[0], datetime.fromisoformat(row[1]), _time(row[2]), *row[3:]) for row in rows]

    def begin(self, config: str, log: Path, keep: int) -> int:
        """A new run's number. Of the config's runs `keep` stay, with their logs."""
        with self._open() as database:
            old = database.execute(
                "SELECT id, log FROM runs WHERE config = ? ORDER BY id DESC LIMIT -1 OFFSET ?", [config, keep - 1]
            ).fetchall()
            for number, path in old:
                database.execute("DELETE FROM runs WHERE id = ?", [number])
                Path(path).unlink(missing_ok=True)
            done = database.execute(
                "INSERT INTO runs (config, began, state, log) VALUES (?, ?, 'running', ?)",
                [config, _text(datetime.now(UTC)), str(log)],
            )
            assert done.lastrowid is not None
            return done.lastrowid

    def end(self, number: int, state: str, code: int | None) -> None:
        with self._open() as database:
            values = [_text(datetime.now(UTC)), code, state, number]
            database.execute("UPDATE runs SET ended = ?, code = ?, state = ? WHERE id = ?", values)

    def cut(self, number: int) -> None:
        """When a run was cut, nobody knows."""
        with self._open() as database:
            database.execute("UPDATE runs SET state = 'cut' WHERE id = ?", [number])

    def lock(self, config: str, what: str) -> Path:
        """The file that a config's `scheduler` holds, or its `run`."""
        return self.folder / f"{Path(config).stem}-{hashlib.sha256(config.encode()).hexdigest()[:8]}.{what}.lock"

    def alive(self, config: str, what: str) -> bool:
        path = self.lock(config, what)
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
            raise ScheduleError(f"{path} cannot be used: {error}") from error


def _text(time: datetime | None) -> str | None:
    return time.astimezone(UTC).isoformat() if time else None


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
