"""The scheduler: runs that are late, interrupted, stopped or still active."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from small_data import Run

from refract.pipeline.files import locked
from refract.pipeline.schedule.cron import Cron
from refract.pipeline.schedule.scheduler import Plan, Runner
from refract.pipeline.schedule.store import Schedule, ScheduleStore

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two

BERLIN = ZoneInfo("Europe/Berlin")

# Runs instead of `refract retrain`: records its start and last argument, and exits as files next to its config say.
STUB = """
import signal, sys, time
from pathlib import Path
here = Path(sys.argv[1]).parent
def asked(number, _):
    (here / "asked").write_text(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGTERM, asked)
with (here / "began").open("a") as file:
    file.write(" ".join(sys.argv[2:]) + "\\n")
print("trained, says the stub")
while (here / "hold").exists():
    time.sleep(0.02)
(here / "done").open("a").write("x")
sys.exit(int((here / "code").read_text()) if (here / "code").exists() else 0)
"""

# `refract schedule` with a custom trigger, faster than cron: argv is config, state, stub, seconds, grace or -.
KEEPER = """
import logging, sys
from datetime import UTC
from pathlib import Path
from zoneinfo import ZoneInfo
from apscheduler.triggers.interval import IntervalTrigger
from refract.pipeline.schedule.store import ScheduleStore
from refract.pipeline.schedule.scheduler import Plan, run_scheduler
logging.basicConfig(level=logging.INFO, format="%(message)s")
config, state, stub, seconds, grace = sys.argv[1:]
trigger = IntervalTrigger(seconds=float(seconds), timezone=UTC)
plan = Plan(Path(config), "often", ZoneInfo("UTC"), trigger, [sys.executable, stub], None if grace == "-" else float(grace), keep=3)
sys.exit(run_scheduler(plan, ScheduleStore(Path(state))))
"""


class Workspace:
    """A config, the stub, and schedulers for them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config, self.state = folder, folder / "photos.yaml", folder / "state"
        self.config.write_text("tracking: {model_name: photos}\n")
        self.stub = folder / "stub.py"
        self.stub.write_text(STUB)
        self.started: list[subprocess.Popen[str]] = []

    @property
    def book(self) -> ScheduleStore:
        return ScheduleStore(self.state)

    def start(self, seconds: float = 0.3, grace: str = "-") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KEEPER, self.config, self.state, self.stub, seconds, grace]
        return self.open([str(part) for part in command])

    def open(self, command: list[str]) -> subprocess.Popen[str]:
        log = (self.folder / f"scheduler-{len(self.started)}.log").open("w")
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=self.folder)
        self.started.append(process)
        return process

    def log(self) -> str:
        """What the newest scheduler says."""
        return (self.folder / f"scheduler-{len(self.started) - 1}.log").read_text()

    def began(self) -> list[str]:
        """Of each run, what stood behind the config."""
        path = self.folder / "began"
        return path.read_text().splitlines() if path.exists() else []

    def hold(self) -> None:
        (self.folder / "hold").touch()

    def release(self) -> None:
        (self.folder / "hold").unlink()

    def runs(self) -> list[str]:
        return [run.words(is_retrain=False) for run in self.book.runs(str(self.config), 10)]

    def was_due(self, ago: timedelta, cron: str = "often") -> None:
        due = datetime.now(UTC) - ago
        self.book.write(Schedule(str(self.config), cron, "UTC", "", due, None))


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    workspace = Workspace(tmp_path)
    yield workspace
    for process in workspace.started:
        process.kill()
        process.wait()
    (tmp_path / "hold").unlink(missing_ok=True)  # a stub that outlived its scheduler ends too


def until(true: Callable[[], object], what: str, within: float = 30) -> None:
    end = time.monotonic() + within
    while not true():
        assert time.monotonic() < end, f"not in {within} s: {what}"
        time.sleep(0.02)


def ended(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> int:
    process.send_signal(number)
    return process.wait(30)


def test_it_fires_again_and_again_and_the_newest_logs_stay(workspace: Workspace, refract: Run) -> None:
    scheduler = workspace.start()
    until(lambda: len(workspace.began()) >= 5, "five runs")
    listed = refract("schedule", "--list", "--state", workspace.state).stdout
    assert (
        f"{workspace.config}\n" in listed and "often (UTC)" in listed and f"active, process {scheduler.pid}" in listed
    )
    assert "done (exit code 0)" in listed
    (workspace.folder / "code").write_text("20")
    count = len(workspace.began())
    until(lambda: len(workspace.began()) >= count + 3, "three runs more")
    assert ended(scheduler) == 0
    assert "exit code 20" in workspace.log() and "the scheduler stops, by SIGTERM" in workspace.log()
    assert "not running" in refract("schedule", "--list", "--state", workspace.state).stdout
    runs = workspace.book.runs(str(workspace.config), 10)
    assert len(runs) == 3 and all(Path(run.log).is_file() for run in runs)
    assert {"trained, says the stub\n"} >= {Path(run.log).read_text() for run in runs[1:]}
    assert {*workspace.state.glob("*.log")} == {Path(run.log) for run in runs}, "of the older ones nothing is left"
    assert set(workspace.began()) == {""}, "each is a new run"


def test_exit_codes_are_described(workspace: Workspace) -> None:
    meanings = {0: "promoted", 10: "not promoted", 20: "refused", 30: "failed", -9: "SIGKILL", 99: "exit code 99"}
    for code, word in meanings.items():
        workspace.book.end(workspace.book.begin("c", workspace.folder / "a.log", 30), "ended", code)
        assert word in workspace.book.runs("c", 1)[0].words()


def test_a_second_scheduler_of_a_config_is_refused(workspace: Workspace, refract: Run) -> None:
    first = workspace.start(3600)
    until(lambda: workspace.book.alive(str(workspace.config), "scheduler"), "the first one holds its lock")
    until(lambda: workspace.book.schedules(), "it has written itself down")
    again = refract("schedule", workspace.config, "--cron", "0 2 * * *", "--state", workspace.state, code=1)
    assert f"already has a scheduler, process {first.pid}; stop it first" in again.stderr
    assert (
        "stop it first" in refract("schedule", workspace.config, "--forget", "--state", workspace.state, code=2).stderr
    )
    assert ended(first) == 0
    refract("schedule", workspace.config, "--forget", "--state", workspace.state)
    assert "no schedule in" in refract("schedule", "--list", "--state", workspace.state).stdout


def test_a_run_that_takes_longer_is_never_joined_by_a_second(workspace: Workspace) -> None:
    workspace.hold()
    scheduler = workspace.start(0.2)
    until(lambda: workspace.log().count("is skipped: the previous one is still active") >= 3, "three runs are skipped")
    assert len(workspace.began()) == 1 and "outlived" not in workspace.log()
    workspace.release()
    until(lambda: len(workspace.began()) >= 2, "the next one")
    assert ended(scheduler) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_is_passed_to_the_run_whose_end_is_waited_for(workspace: Workspace, number: int, code: int) -> None:
    workspace.hold()
    workspace.stub.write_text(
        STUB.replace("signal.signal(signal.SIGTERM, asked)", f"signal.signal({int(number)}, asked)")
    )
    scheduler = workspace.start()
    until(workspace.began, "a run")
    assert ended(scheduler, number) == code
    assert (workspace.folder / "asked").read_text() == signal.Signals(number).name
    assert workspace.runs() == ["exit code 75"]
    workspace.release()
    again = workspace.start(3600)
    until(lambda: len(workspace.began()) == 2, "it resumes at once")
    until(lambda: "done" in workspace.runs()[0], "its end")
    assert workspace.began() == ["", "--resume"]
    assert "was stopped with its scheduler; it resumes now" in workspace.log()
    assert ended(again) == 0
    workspace.start(3600)
    until(lambda: "next run" in workspace.log(), "there is nothing to resume")


def test_a_run_killed_with_its_scheduler_resumes_at_once(workspace: Workspace, refract: Run) -> None:
    workspace.hold()
    scheduler = workspace.start()
    until(workspace.began, "a run")
    until(lambda: "process" in workspace.log(), "its number")
    child = int(workspace.log().partition(": process ")[2].partition(",")[0])
    ended(scheduler, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    workspace.release()
    until(lambda: not workspace.book.alive(str(workspace.config), "run"), "its end")
    assert "interrupted" in refract("schedule", "--list", "--state", workspace.state).stdout
    workspace.start(3600)
    until(lambda: len(workspace.began()) == 2 and "done" in workspace.runs()[0], "it resumes")
    assert workspace.began() == ["", "--resume"]
    assert "was interrupted; it resumes now" in workspace.log() and workspace.runs()[1] == "interrupted"


def test_a_run_killed_before_its_start_starts_anew(workspace: Workspace) -> None:
    workspace.book.cut(workspace.book.begin(str(workspace.config), workspace.folder / "a.log", 30))
    workspace.stub.write_text(STUB.replace("sys.exit(int(", "sys.exit(2 if '--resume' in sys.argv else int("))
    scheduler = workspace.start(3600)
    until(lambda: len(workspace.began()) == 2 and "done" in workspace.runs()[0], "a new run")
    assert workspace.began() == ["--resume", ""] and workspace.runs()[1] == "exit code 2"
    assert ended(scheduler) == 0


def test_a_run_that_crashes_its_scheduler_resumes_three_times(workspace: Workspace) -> None:
    for _ in range(4):
        workspace.book.cut(workspace.book.begin(str(workspace.config), workspace.folder / "a.log", 30))
    workspace.start(3600)
    until(lambda: "next run" in workspace.log(), "it waits for its hour")
    assert not workspace.began()


def test_a_run_that_outlived_its_scheduler_is_waited_for(workspace: Workspace) -> None:
    workspace.hold()
    ended_at_once = workspace.start()
    until(workspace.began, "a run")
    ended(ended_at_once, signal.SIGKILL)
    scheduler = workspace.start(3600)
    until(lambda: "outlived its scheduler is still active" in workspace.log(), "it is seen")
    assert len(workspace.began()) == 1
    workspace.release()
    until(lambda: "the run has ended" in workspace.log(), "its end")
    assert workspace.runs() == ["ended without a scheduler"] and workspace.began() == [""]
    assert (workspace.folder / "done").read_text() == "x"
    assert ended(scheduler) == 0


def test_listing_the_runs_does_not_prevent_one(workspace: Workspace) -> None:
    """`--list` briefly holds the run's lock. A start in that moment was mistaken for one during a run of an earlier scheduler."""
    plan = Plan(
        workspace.config,
        "often",
        ZoneInfo("UTC"),
        Cron("* * * * *", ZoneInfo("UTC")),
        [sys.executable, str(workspace.stub)],
    )
    with ExitStack() as stack:
        stack.enter_context(locked(workspace.book.lock(str(workspace.config), "run"), AssertionError()))
        letting_go = threading.Timer(0.3, stack.pop_all().close)
    letting_go.start()
    Runner(plan, workspace.book).fire()
    letting_go.join()
    assert workspace.began() == [""] and workspace.runs() == ["done (exit code 0)"]


def test_one_of_several_missed_runs_is_started(workspace: Workspace) -> None:
    workspace.was_due(timedelta(hours=5))
    scheduler = workspace.start(3600)
    until(lambda: workspace.runs() and "done" in workspace.runs()[0], "a run")
    (schedule,) = workspace.book.schedules()
    assert schedule.due is not None and schedule.due > datetime.now(UTC), "five were missed, and the next is in an hour"
    assert workspace.began() == [""] and "a run was due on" in workspace.log()
    assert ended(scheduler) == 0


def test_a_run_that_is_too_late_is_skipped(workspace: Workspace) -> None:
    workspace.was_due(timedelta(hours=5, minutes=30))
    scheduler = workspace.start(3600, grace="60")
    until(lambda: "is skipped: it is more than 60 s late" in workspace.log(), "it is logged")
    until(lambda: workspace.book.schedules()[0].due > datetime.now(UTC), "the next one")
    assert not workspace.began()
    assert ended(scheduler) == 0


def test_a_missed_run_of_another_cron_is_not_started(workspace: Workspace) -> None:
    workspace.was_due(timedelta(hours=5), cron="0 2 * * *")
    workspace.start(3600)
    until(lambda: "next run" in workspace.log(), "the new one's time")
    assert not workspace.began()


def test_a_missing_command_is_logged_and_the_schedule_continues(workspace: Workspace) -> None:
    workspace.open(
        [
            *(sys.executable, "-c", KEEPER.replace("[sys.executable, stub]", "['/no/such/command']")),
            *map(str, (workspace.config, workspace.state, workspace.stub, 0.3, "-")),
        ]
    )
    until(lambda: workspace.log().count("no run: [Errno 2]") >= 2, "it is logged twice")
    assert "could not be started" in workspace.runs()[1] and "Traceback" not in workspace.log()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected either CONFIG or --list"),
        (("photos.yaml", "--list"), "expected either CONFIG or --list"),
        (("photos.yaml",), "has no stored schedule; add --cron"),
        (("nothing.yaml", "--cron", "0 2 * * *"), "nothing.yaml: no such file"),
        (("photos.yaml", "--cron", "0 25 * * *"), "is not a cron expression"),
        (("photos.yaml", "--cron", "0 2 * * *", "--timezone", "Mars"), "--timezone: 'Mars'"),
        (("photos.yaml", "--cron", "0 2 * * *", "--command", "nice 'x"), '--command: "nice \'x"'),
        (("photos.yaml", "--cron", "0 2 * * *", "--keep", "0"), "--keep 0: expected at least 1"),
        (("photos.yaml", "--cron", "0 2 * * *", "--grace-s", "-3"), "--grace-s -3: expected seconds above 0"),
        (("photos.yaml", "--forget"), "has no schedule in"),
        (("nameless.yaml", "--cron", "0 2 * * *"), "needs tracking.model_name"),
        (("stub.py", "--cron", "0 2 * * *"), "stub.py"),
    ],
)
def test_unusable_input_is_named(workspace: Workspace, refract: Run, arguments: tuple[str, ...], message: str) -> None:
    (workspace.folder / "nameless.yaml").write_text("data: {source: digits}\n")
    assert message in refract("schedule", *arguments, code=2).stderr


def test_a_damaged_store_is_named(workspace: Workspace, refract: Run) -> None:
    workspace.state.mkdir()
    (workspace.state / "schedule.db").write_bytes(b"no database" * 100)
    assert "schedule.db cannot be used" in refract("schedule", "--list", "--state", workspace.state, code=1).stderr


def test_the_command_is_refract_retrain(workspace: Workspace, refract: Run) -> None:
    workspace.config.write_text("tracking: {model_name: photos}\ndata: {source: nowhere}\n")
    workspace.was_due(timedelta(hours=1), cron="0 2 * * *")
    scheduler = workspace.open(
        [sys.executable, "-m", "refract", "schedule", str(workspace.config), "--state", str(workspace.state)]
    )
    until(lambda: workspace.book.runs(str(workspace.config), 1) and "ended" in workspace.log(), "its end", within=120)
    (run,) = workspace.book.runs(str(workspace.config), 5)
    assert run.words() == "data refused (exit code 20)" and "nowhere" in Path(run.log).read_text()
    assert "data refused (exit code 20)" in refract("schedule", "--list", "--state", workspace.state).stdout
    assert ended(scheduler) == 0


def test_a_cron_of_every_minute_fires_with_the_minute(workspace: Workspace, refract: Run) -> None:
    """The command itself, by the machine's clock; restarted without --cron, it uses the stored schedule."""
    command = [sys.executable, "-m", "refract", "schedule", str(workspace.config), "--state", str(workspace.state)]
    first = workspace.open(
        [*command, "--cron", "* * * * *", "--timezone", "UTC", "--command", f"{sys.executable} {workspace.stub}"]
    )
    until(lambda: workspace.runs() and "done" in workspace.runs()[0], "a run in the first minute", within=90)
    (run,) = workspace.book.runs(str(workspace.config), 5)
    assert run.began.second < 5, "with the minute"
    assert ended(first) == 0
    again = workspace.open(command)
    until(lambda: workspace.book.alive(str(workspace.config), "scheduler"), "it is back")
    until(lambda: "next run" in workspace.log() or len(workspace.began()) == 2, "it knows its cron")
    assert (
        f"command    {sys.executable} {workspace.stub}"
        in refract("schedule", "--list", "--state", workspace.state).stdout
    )
    assert ended(again) == 0
