"""`refract schedule --on-labels` and `--on-drift`: which readings start a run, and which a run has taken in."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from small_data import Run

from refract.pipeline.config.config import ConfigError
from refract.pipeline.labels.decisions import Action, Decision
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.retraining.workspace import write
from refract.pipeline.schedule.on_drift import DriftError, OnDrift
from refract.pipeline.schedule.on_labels import OnLabels, label_trigger
from refract.pipeline.schedule.scheduler import Plan, Runner
from refract.pipeline.schedule.store import Reading, Schedule, ScheduleStore
from refract.pipeline.schedule.triggers import Trigger, Watch

CONFIG = "/srv/photos.yaml"
NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def summary_of(store: ScheduleStore, config: str) -> str:
    """Return what the first trigger last read, as a text; "" before its first reading."""
    reading = store.triggers(config)[0].reading
    return "" if reading is None else reading.summary


@pytest.fixture
def store(tmp_path: Path) -> ScheduleStore:
    return ScheduleStore(tmp_path / "state")


@pytest.fixture
def history(tmp_path: Path) -> LabelHistory:
    return LabelHistory(tmp_path / "labels.db", create=True)


def decide(history: LabelHistory, image: int, action: Action, *labels: str, reviewer: str = "ann") -> int:
    content = hashlib.sha256(str(image).encode()).hexdigest()
    return history.append(
        Decision(content=content, path=f"{image}.png", action=action, labels=labels, reviewer=reviewer)
    )


def trigger_at(tmp_path: Path, least: int) -> OnLabels:
    return label_trigger(str(tmp_path / "labels.db"), least, tmp_path / "last.json")


def watch(store: ScheduleStore, *triggers: Trigger, min_interval_s: float = 3600.0) -> Watch:
    store.set_triggers(CONFIG, {one.name: one.argument for one in triggers})
    return Watch(CONFIG, triggers, store, min_interval_s)


def has_run(store: ScheduleStore, code: int = 0, state: str = "ended") -> None:
    """A run starts and ends now."""
    store.end(store.begin(CONFIG, store.folder / "a.log", 30, reason="cron", marks=store.marks(CONFIG)), state, code)


def test_labels_count_images_that_decisions_changed_since_the_last_run(
    store: ScheduleStore, history: LabelHistory, tmp_path: Path
) -> None:
    watched = watch(store, trigger_at(tmp_path, 3))
    assert watched.check(NOON) is None
    decide(history, 1, "relabel", "dog")
    decide(history, 1, "relabel", "cat")  # the same image
    decide(history, 2, "exclude")
    decide(history, 3, "confirm", "dog")  # says what the source says
    decide(history, 4, "skip")
    history.undo(decide(history, 5, "relabel", "dog"), reviewer="ann")
    assert watched.check(NOON) is None
    reading = store.triggers(CONFIG)[0].reading
    assert reading is not None and reading.summary == "2 of 3 images changed by decisions in the label history"
    decide(history, 6, "add", "dog")
    assert watched.check(NOON) == "labels: 3 of 3 images changed by decisions in the label history"
    has_run(store)
    decide(history, 2, "exclude", reviewer="bob")  # it is excluded already
    decide(history, 1, "confirm", "cat")
    later = datetime.now(UTC) + timedelta(hours=2)
    assert watched.check(later) is None
    assert "0 of 3 images changed by decisions since decision 8" in summary_of(store, CONFIG)
    for image in (2, 3, 4):
        decide(history, image, "relabel", "wolf")
    assert watched.check(later) == "labels: 3 of 3 images changed by decisions since decision 8"


def test_a_run_by_hand_takes_decisions_in_too(store: ScheduleStore, history: LabelHistory, tmp_path: Path) -> None:
    watched = watch(store, trigger_at(tmp_path, 1))
    last = decide(history, 1, "relabel", "dog")
    assert watched.check(NOON)
    write(tmp_path / "last.json", {"label_decision": last})
    assert watched.check(NOON) is None
    write(tmp_path / "last.json", {"run": "of an earlier version"})
    assert watched.check(NOON) is None, "the store remembers it"


@pytest.mark.parametrize(("code", "state", "again"), [(0, "ended", False), (10, "ended", False), (20, "ended", False),
                                                      (30, "ended", True), (2, "ended", True), (0, "unseen", False)])  # fmt: skip
def test_a_run_without_a_decision_is_repeated_after_the_interval(
    store: ScheduleStore, history: LabelHistory, tmp_path: Path, code: int, state: str, again: bool
) -> None:
    watched = watch(store, trigger_at(tmp_path, 1))
    decide(history, 1, "relabel", "dog")
    assert watched.check(NOON)
    has_run(store, code, state)
    began = store.runs(CONFIG, 1)[0].began
    assert watched.check(began + timedelta(minutes=59)) is None
    assert bool(watched.check(began + timedelta(minutes=61))) is again


def test_a_database_that_fails_is_shown_and_starts_nothing(
    store: ScheduleStore, history: LabelHistory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(store, trigger_at(tmp_path, 1))
    last = decide(history, 1, "relabel", "dog")
    watched.check(NOON)
    has_run(store)
    (tmp_path / "labels.db").rename(tmp_path / "away.db")
    assert watched.check(NOON) is None and watched.check(NOON) is None
    assert caplog.text.count("trigger labels: not measured: ") == 1, "the same message is logged once"
    (state,) = store.triggers(CONFIG)
    assert state.reading is not None and state.reading.failed and state.handled == str(last)


def test_an_older_copy_of_the_database_is_shown_until_a_run_takes_it_in(
    store: ScheduleStore, history: LabelHistory, tmp_path: Path
) -> None:
    watched = watch(store, trigger_at(tmp_path, 2), min_interval_s=0)
    now = datetime.now(UTC) + timedelta(hours=1)
    decide(history, 1, "relabel", "dog")
    shutil.copy(tmp_path / "labels.db", tmp_path / "older.db")
    for image in (2, 3):
        decide(history, image, "relabel", "dog")
    assert watched.check(now)
    has_run(store)
    write(tmp_path / "last.json", {"label_decision": 3})
    (tmp_path / "older.db").replace(tmp_path / "labels.db")
    for leftover in tmp_path.glob("labels.db-*"):
        leftover.unlink()
    older = LabelHistory(tmp_path / "labels.db")
    decide(older, 4, "relabel", "dog")
    assert watched.check(now) is None
    (state,) = store.triggers(CONFIG)
    assert (
        state.reading is not None and "ends with decision 2, before decision 3 of the last run" in state.reading.summary
    )
    write(tmp_path / "last.json", {"label_decision": 2})  # by a run that was started by hand
    assert watched.check(now) is None
    for image in (5, 6):
        decide(older, image, "relabel", "dog")
    assert watched.check(now) == "labels: 2 of 2 images changed by decisions since decision 2"


def test_a_run_that_ends_during_a_check_has_taken_in_what_it_took_in(store: ScheduleStore) -> None:
    class EndsMeanwhile(Measured):
        def _measured(self, known: Any) -> dict[str, Any]:
            has_run(store, 10)
            return super()._measured(known)

    watched = watch(store, Measured(Path(CONFIG), "inputs", results=[("warn", "3")]), min_interval_s=0)
    now = datetime.now(UTC) + timedelta(hours=1)
    assert watched.check(now)
    watch(store, EndsMeanwhile(Path(CONFIG), "inputs", results=[("warn", "3")]), min_interval_s=0).check(now)
    assert store.triggers(CONFIG)[0].handled == "3"


def test_a_clock_that_was_set_back_delays_no_run(store: ScheduleStore, history: LabelHistory, tmp_path: Path) -> None:
    watched = watch(store, trigger_at(tmp_path, 1))
    has_run(store)
    decide(history, 1, "relabel", "dog")
    began = store.runs(CONFIG, 1)[0].began
    assert watched.check(began) is None and watched.check(began - timedelta(days=365))


@pytest.mark.parametrize(
    ("labels", "message"), [(None, "has no data.labels"), ("labels.db@7", "remove @7"), ("no.db", "no such label database")]
)  # fmt: skip
def test_labels_that_cannot_grow_are_refused(tmp_path: Path, labels: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        label_trigger(labels, 5, tmp_path / "last.json")


@dataclass
class Measured(OnDrift):
    """Drift with given results instead of a measuring process."""

    results: list[tuple[str | None, str]] = field(default_factory=list)

    def _measured(self, known: Any) -> dict[str, Any]:
        level, champion = self.results.pop(0)
        return {"level": level, "champion": champion, "data": "", "summary": f"level {level}"}


def test_one_drift_starts_one_run_until_it_ends_or_the_champion_changes(store: ScheduleStore) -> None:
    drift = Measured(Path(CONFIG), "inputs", results=[("none", "3"), ("warn", "3")])
    watched = watch(store, drift, min_interval_s=0)
    now = datetime.now(UTC) + timedelta(hours=1)
    assert watched.check(now) is None
    assert watched.check(now) == "drift: level warn"
    has_run(store, 10)
    drift.results += [("warn", "3"), ("stop", "3"), (None, "3"), ("warn", "3")]
    assert [watched.check(now) for _ in range(4)] == [None] * 4
    assert "a run has taken this drift in" in summary_of(store, CONFIG)
    drift.results += [("none", "3"), ("warn", "3")]
    assert [watched.check(now) for _ in range(2)] == [None, "drift: level warn"]
    has_run(store, 0)
    drift.results += [("warn", "3"), (None, "4"), ("warn", "4")]
    assert [watched.check(now) for _ in range(3)] == [None, None, "drift: level warn"], (
        "the new champion has drift, too"
    )


def test_a_failed_run_leaves_the_drift_to_the_next_one_and_other_data_are_new(store: ScheduleStore) -> None:
    drift = Measured(
        Path(CONFIG), "inputs", "stop", results=[("warn", "3"), ("stop", "3"), ("stop", "3"), ("stop", "3")]
    )
    watched = watch(store, drift, min_interval_s=0)
    now = datetime.now(UTC) + timedelta(hours=1)
    assert [watched.check(now) for _ in range(2)] == [None, "drift: level stop"]
    has_run(store, 30)
    assert watched.check(now)
    has_run(store, 20)
    assert watched.check(now) is None
    other = Measured(Path(CONFIG), "other inputs", "stop", results=[("stop", "3")])
    assert watch(store, other, min_interval_s=0).check(now)


def test_triggers_combine(store: ScheduleStore, history: LabelHistory, tmp_path: Path) -> None:
    drift = Measured(Path(CONFIG), "inputs", results=[("warn", "1"), ("warn", "1")])
    watched = watch(store, trigger_at(tmp_path, 1), drift)
    assert watched.check(NOON) == "drift: level warn"
    decide(history, 1, "relabel", "dog")
    reason = watched.check(NOON)
    assert reason == "labels: 1 of 1 images changed by decisions in the label history; drift: level warn"
    assert store.marks(CONFIG) == {"labels": "1", "drift": "1"}


def test_a_measurement_that_fails_names_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("nothing: 1\n")
    drift = OnDrift(tmp_path / "bad.yaml", "inputs")
    with pytest.raises(DriftError, match=r"refract schedule --on-drift: .*nothing"):
        drift.read("", None)
    drift.stop()
    with pytest.raises(DriftError, match="the scheduler stops"):
        drift.read("", None)


def test_a_store_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "schedule.db") as database:
        database.executescript(
            "CREATE TABLE schedules (config TEXT PRIMARY KEY, cron TEXT, zone TEXT, command TEXT, due TEXT, process INTEGER);"
            "CREATE TABLE runs (id INTEGER PRIMARY KEY, config TEXT, began TEXT, ended TEXT, code INTEGER, state TEXT, log TEXT);"
            f"INSERT INTO schedules VALUES ('{CONFIG}', '0 2 * * *', 'UTC', '', NULL, 7);"
            f"INSERT INTO runs VALUES (1, '{CONFIG}', '{NOON.isoformat()}', NULL, 10, 'ended', 'a.log');"
        )
    database.close()
    store = ScheduleStore(tmp_path)
    assert store.schedules() == [Schedule(CONFIG, "0 2 * * *", "UTC", "", None, 7)] and not store.triggers(CONFIG)
    assert [(run.code, run.reason, dict(run.marks)) for run in store.runs(CONFIG, 5)] == [(10, "", {})]


STUB = """
import sys, time
from pathlib import Path
here = Path(sys.argv[1]).parent
with (here / "began").open("a") as file:
    file.write(" ".join(sys.argv[2:]) + "\\n")
while (here / "hold").exists():
    time.sleep(0.02)
"""


@pytest.fixture
def scheduled(tmp_path: Path, history: LabelHistory) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `refract schedule` on a config with a label history, whose runs are the stub."""
    (tmp_path / "photos.yaml").write_text("tracking: {model_name: photos}\ndata: {source: images, labels: labels.db}\n")
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "hold").touch()
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "refract", "schedule", "photos.yaml", "--state", "state", *options]
        with (tmp_path / "scheduler.log").open("a") as log:
            started.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, text=True))
        return started[-1]

    yield start
    (tmp_path / "hold").unlink(missing_ok=True)
    for process in started:
        process.kill()
        process.wait()


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, f"not in a minute: {what}"
        time.sleep(0.02)


@pytest.mark.slow
def test_labels_start_one_run_that_survives_a_kill(
    scheduled: Callable[..., subprocess.Popen[str]], history: LabelHistory, tmp_path: Path, refract: Run
) -> None:
    store, config = ScheduleStore(tmp_path / "state"), str(tmp_path / "photos.yaml")

    def began() -> list[str]:
        return (tmp_path / "began").read_text().splitlines() if (tmp_path / "began").exists() else []

    decide(history, 1, "relabel", "dog")
    stub = f"{sys.executable} {tmp_path / 'stub.py'}"
    scheduler = scheduled("--on-labels", "2", "--check-s", "1", "--command", stub)
    until(lambda: store.triggers(config) and store.triggers(config)[0].reading, "a check")
    listed = refract("schedule", "--list", "--state", "state").stdout
    assert "on labels  2: 1 of 2 images changed by decisions in the label history; checked 20" in listed
    assert "cron" not in listed and "next" not in listed and not began()
    decide(history, 2, "exclude")
    until(began, "a run")
    until(lambda: "process" in (tmp_path / "scheduler.log").read_text(), "its number")
    child = int((tmp_path / "scheduler.log").read_text().partition(": process ")[2].partition(",")[0])
    scheduler.kill()
    scheduler.wait()
    os.kill(child, signal.SIGKILL)
    until(lambda: not store.alive(config, "run"), "the run's end")
    scheduler = scheduled("--check-s", "1")
    until(lambda: len(began()) == 2, "it resumes, by the stored schedule")
    (tmp_path / "hold").unlink()
    until(lambda: store.triggers(config)[0].handled == "2", "the resumed run has taken both decisions in")
    assert began() == ["", "--resume"]
    until(lambda: "0 of 2 images changed by decisions since decision 2" in summary_of(store, config), "0")
    runs = store.runs(config, 5)
    assert len(runs) == 2 and {run.reason for run in runs} == {
        "labels: 2 of 2 images changed by decisions in the label history"
    }
    listed = refract("schedule", "--list", "--state", "state").stdout
    assert "last start by labels: 2 of 2 images changed" in listed
    scheduler.send_signal(signal.SIGTERM)
    assert scheduler.wait(30) == 0


def test_a_run_that_is_due_during_another_is_skipped(
    store: ScheduleStore, history: LabelHistory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A reading that fires a second run while the first one is active, as cron does in the middle of a run by labels."""
    (tmp_path / "stub.py").write_text(STUB)
    config = tmp_path / "photos.yaml"
    command = [sys.executable, str(tmp_path / "stub.py")]
    runner: Runner

    class During(Measured):
        def read(self, handled: str, before: Reading | None) -> Reading:
            return Reading("drift", value=1, threshold=1, due=True, mark="1")

    plan = Plan(config, "", ZoneInfo("UTC"), None, command, triggers=[During(config, "x")], min_interval_s=0)
    store.set_triggers(str(config), {"drift": "x"})
    runner = Runner(plan, store)
    begin = store.begin

    def begins(*arguments: Any, **named: Any) -> int:
        runner.fire("cron")
        runner.check()
        return begin(*arguments, **named)

    store.begin = begins  # type: ignore[method-assign] # another thread's run, at a certain moment of this one
    runner.fire("labels: 3 of 3")
    assert (tmp_path / "began").read_text().splitlines() == [""]
    assert "the run by cron is skipped: the previous one is still active" in caplog.text
    assert [run.reason for run in store.runs(str(config), 5)] == ["labels: 3 of 3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--on-labels", "0"), "--on-labels 0: expected at least 1"),
        (("--on-labels", "5"), "--on-labels: the config has no data.labels"),
        (("--drift-level", "stop"), "--drift-level: expected together with --on-drift"),
        (("--on-drift", "x", "--check-s", "0"), "--check-s 0: expected seconds from 1"),
        (("--on-drift", "x", "--min-interval-s", "-1"), "--min-interval-s -1: expected seconds of at least 0"),
        (("--cron", ""), "is not a cron expression"),
        ((), "add --cron"),
    ],
)
def test_unusable_options_are_named(tmp_path: Path, refract: Run, options: tuple[str, ...], message: str) -> None:
    (tmp_path / "photos.yaml").write_text("tracking: {model_name: photos}\n")
    assert message in refract("schedule", "photos.yaml", *options, code=2).stderr


def test_a_schedule_without_times_and_triggers_is_none(tmp_path: Path, refract: Run) -> None:
    """A process that was killed between its two writes leaves it."""
    config = tmp_path / "photos.yaml"
    config.write_text("tracking: {model_name: photos}\n")
    ScheduleStore(tmp_path / "state").write(Schedule(str(config), "", "UTC", "", None, 7))
    done = refract("schedule", str(config), "--state", str(tmp_path / "state"), code=2)
    assert "has no stored schedule; add --cron" in done.stderr


def test_the_list_as_json_has_the_triggers(tmp_path: Path, refract: Run) -> None:
    store = ScheduleStore(tmp_path / "state")
    store.write(Schedule(CONFIG, "", "UTC", "", None, None))
    store.set_triggers(CONFIG, {"drift": json.dumps(["/srv/inputs", "warn"])})
    store.record_reading(CONFIG, "drift", Reading("no drift", value=0, threshold=1), NOON, "")
    assert "on drift   /srv/inputs from level warn: no drift; checked 2030-01-01 12:00:00" in refract(
        "schedule", "--list", "--state", "state"
    ).stdout  # fmt: skip
    listed = json.loads(refract("schedule", "--list", "--state", "state", "--json").stdout)
    assert listed["triggers"][0]["reading"]["threshold"] == 1
