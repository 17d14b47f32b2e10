"""Starting by the clock: what a scheduler does with runs that are late, cut, stopped or still under way."""

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

# What is started instead of a retraining: notes that it began, with its last argument, and ends as the files beside its config say.
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

# `refract schedule` with a trigger of its own, to be faster than cron: argv is config, state, stub, seconds, grace or -.
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

    def told(self) -> str:
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
        return [run.words(own=False) for run in self.book.runs(str(self.config), 10)]

    def was_due(self, ago: timedelta, cron: str = "often") -> None:
        due = datetime.now(UTC) - ago
        self.book.write(Schedule(str(self.config), cron, "UTC", "", due, None))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workspace]:
    made = Workspace(tmp_path)
    yield made
    for process in made.started:
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


def test_it_fires_again_and_again_and_the_newest_logs_stay(place: Workspace, refract: Run) -> None:
    scheduler = place.start()
    until(lambda: len(place.began()) >= 5, "five runs")
    listed = refract("schedule", "--list", "--state", place.state).stdout
    assert f"{place.config}\n" in listed and "often (UTC)" in listed and f"alive, process {scheduler.pid}" in listed
    assert "done (exit code 0)" in listed
    (place.folder / "code").write_text("20")
    count = len(place.began())
    until(lambda: len(place.began()) >= count + 3, "three runs more")
    assert ended(scheduler) == 0
    assert "exit code 20" in place.told() and "the scheduler ends, by SIGTERM" in place.told()
    assert "not running" in refract("schedule", "--list", "--state", place.state).stdout
    runs = place.book.runs(str(place.config), 10)
    assert len(runs) == 3 and all(Path(run.log).is_file() for run in runs)
    assert {"trained, says the stub\n"} >= {Path(run.log).read_text() for run in runs[1:]}
    assert {*place.state.glob("*.log")} == {Path(run.log) for run in runs}, "of the older ones nothing is left"
    assert set(place.began()) == {""}, "each begins anew"


def test_exit_codes_are_told_in_words(place: Workspace) -> None:
    meanings = {0: "promoted", 10: "not promoted", 20: "refused", 30: "failed", -9: "SIGKILL", 99: "exit code 99"}
    for code, word in meanings.items():
        place.book.end(place.book.begin("c", place.folder / "a.log", 30), "ended", code)
        assert word in place.book.runs("c", 1)[0].words()


def test_a_second_scheduler_of_a_config_is_refused(place: Workspace, refract: Run) -> None:
    first = place.start(3600)
    until(lambda: place.book.alive(str(place.config), "scheduler"), "the first one holds its lock")
    until(lambda: place.book.schedules(), "it has written itself down")
    again = refract("schedule", place.config, "--cron", "0 2 * * *", "--state", place.state, code=1)
    assert f"has a scheduler already, process {first.pid}" in again.stderr
    assert "stop that first" in refract("schedule", place.config, "--forget", "--state", place.state, code=2).stderr
    assert ended(first) == 0
    refract("schedule", place.config, "--forget", "--state", place.state)
    assert "no schedule in" in refract("schedule", "--list", "--state", place.state).stdout


def test_a_run_that_takes_longer_is_never_joined_by_a_second(place: Workspace) -> None:
    place.hold()
    scheduler = place.start(0.2)
    until(lambda: place.told().count("is left out: the one before is still under way") >= 3, "three times left out")
    assert len(place.began()) == 1 and "outlived" not in place.told()
    place.release()
    until(lambda: len(place.began()) >= 2, "the next one")
    assert ended(scheduler) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_is_passed_to_the_run_whose_end_is_waited_for(place: Workspace, number: int, code: int) -> None:
    place.hold()
    place.stub.write_text(STUB.replace("signal.signal(signal.SIGTERM, asked)", f"signal.signal({int(number)}, asked)"))
    scheduler = place.start()
    until(place.began, "a run")
    assert ended(scheduler, number) == code
    assert (place.folder / "asked").read_text() == signal.Signals(number).name
    assert place.runs() == ["exit code 75"]
    place.release()
    again = place.start(3600)
    until(lambda: len(place.began()) == 2, "it goes on at once")
    until(lambda: "done" in place.runs()[0], "its end")
    assert place.began() == ["", "--resume"]
    assert "was stopped with its scheduler: it goes on at once" in place.told()
    assert ended(again) == 0
    place.start(3600)
    until(lambda: "next run" in place.told(), "nothing is left to go on with")


def test_a_run_that_was_cut_with_its_scheduler_goes_on_at_once(place: Workspace, refract: Run) -> None:
    place.hold()
    scheduler = place.start()
    until(place.began, "a run")
    until(lambda: "process" in place.told(), "its number")
    child = int(place.told().partition(": process ")[2].partition(",")[0])
    ended(scheduler, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    place.release()
    until(lambda: not place.book.alive(str(place.config), "run"), "its end")
    assert "cut short" in refract("schedule", "--list", "--state", place.state).stdout
    place.start(3600)
    until(lambda: len(place.began()) == 2 and "done" in place.runs()[0], "it goes on")
    assert place.began() == ["", "--resume"]
    assert "was cut short: it goes on at once" in place.told() and place.runs()[1] == "cut short"


def test_a_run_that_was_cut_before_it_had_begun_begins_anew(place: Workspace) -> None:
    place.book.cut(place.book.begin(str(place.config), place.folder / "a.log", 30))
    place.stub.write_text(STUB.replace("sys.exit(int(", "sys.exit(2 if '--resume' in sys.argv else int("))
    scheduler = place.start(3600)
    until(lambda: len(place.began()) == 2 and "done" in place.runs()[0], "a new run")
    assert place.began() == ["--resume", ""] and place.runs()[1] == "exit code 2"
    assert ended(scheduler) == 0


def test_a_run_that_takes_its_scheduler_down_goes_on_three_times(place: Workspace) -> None:
    for _ in range(4):
        place.book.cut(place.book.begin(str(place.config), place.folder / "a.log", 30))
    place.start(3600)
    until(lambda: "next run" in place.told(), "it waits for its hour")
    assert not place.began()


def test_a_run_that_outlived_its_scheduler_is_waited_for(place: Workspace) -> None:
    place.hold()
    ended_at_once = place.start()
    until(place.began, "a run")
    ended(ended_at_once, signal.SIGKILL)
    scheduler = place.start(3600)
    until(lambda: "outlived its scheduler is still under way" in place.told(), "it is seen")
    assert len(place.began()) == 1
    place.release()
    until(lambda: "it has ended" in place.told(), "its end")
    assert place.runs() == ["ended while no scheduler watched"] and place.began() == [""]
    assert (place.folder / "done").read_text() == "x"
    assert ended(scheduler) == 0


def test_who_looks_whether_a_run_is_under_way_costs_none(place: Workspace) -> None:
    """`--list` takes the run's lock for a moment; a firing in that moment was taken for one beside a run of an earlier scheduler."""
    plan = Plan(
        place.config, "often", ZoneInfo("UTC"), Cron("* * * * *", ZoneInfo("UTC")), [sys.executable, str(place.stub)]
    )
    with ExitStack() as stack:
        stack.enter_context(locked(place.book.lock(str(place.config), "run"), AssertionError()))
        letting_go = threading.Timer(0.3, stack.pop_all().close)
    letting_go.start()
    Runner(plan, place.book).fire()
    letting_go.join()
    assert place.began() == [""] and place.runs() == ["done (exit code 0)"]


def test_of_the_runs_that_were_missed_one_is_made_up_for(place: Workspace) -> None:
    place.was_due(timedelta(hours=5))
    scheduler = place.start(3600)
    until(lambda: place.runs() and "done" in place.runs()[0], "a run")
    (schedule,) = place.book.schedules()
    assert schedule.due is not None and schedule.due > datetime.now(UTC), "five were missed, and the next is in an hour"
    assert place.began() == [""] and "a run was due on" in place.told()
    assert ended(scheduler) == 0


def test_what_is_too_late_is_left_out(place: Workspace) -> None:
    place.was_due(timedelta(hours=5, minutes=30))
    scheduler = place.start(3600, grace="60")
    until(lambda: "is left out: it is more than 60 s late" in place.told(), "it is told")
    until(lambda: place.book.schedules()[0].due > datetime.now(UTC), "the next one")
    assert not place.began()
    assert ended(scheduler) == 0


def test_what_was_due_by_another_cron_is_not_made_up_for(place: Workspace) -> None:
    place.was_due(timedelta(hours=5), cron="0 2 * * *")
    place.start(3600)
    until(lambda: "next run" in place.told(), "the new one's time")
    assert not place.began()


def test_a_command_that_is_not_there_is_told_and_the_next_time_comes(place: Workspace) -> None:
    place.open(
        [
            *(sys.executable, "-c", KEEPER.replace("[sys.executable, stub]", "['/no/such/command']")),
            *map(str, (place.config, place.state, place.stub, 0.3, "-")),
        ]
    )
    until(lambda: place.told().count("no run: [Errno 2]") >= 2, "it is told twice")
    assert "could not be started" in place.runs()[1] and "Traceback" not in place.told()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "either a CONFIG or --list"),
        (("photos.yaml", "--list"), "either a CONFIG or --list"),
        (("photos.yaml",), "was not scheduled before: --cron is wanted"),
        (("nothing.yaml", "--cron", "0 2 * * *"), "nothing.yaml: there is no such file"),
        (("photos.yaml", "--cron", "0 25 * * *"), "is no line of cron"),
        (("photos.yaml", "--cron", "0 2 * * *", "--timezone", "Mars"), "--timezone: 'Mars'"),
        (("photos.yaml", "--cron", "0 2 * * *", "--command", "nice 'x"), '--command: "nice \'x"'),
        (("photos.yaml", "--cron", "0 2 * * *", "--keep", "0"), "--keep takes a count"),
        (("photos.yaml", "--cron", "0 2 * * *", "--grace-s", "-3"), "a number of seconds above 0"),
        (("photos.yaml", "--forget"), "is not scheduled here"),
        (("nameless.yaml", "--cron", "0 2 * * *"), "needs tracking.model_name"),
        (("stub.py", "--cron", "0 2 * * *"), "stub.py"),
    ],
)
def test_input_that_cannot_be_used_is_told(
    place: Workspace, refract: Run, arguments: tuple[str, ...], told: str
) -> None:
    (place.folder / "nameless.yaml").write_text("data: {source: digits}\n")
    assert told in refract("schedule", *arguments, code=2).stderr


def test_a_damaged_file_is_told(place: Workspace, refract: Run) -> None:
    place.state.mkdir()
    (place.state / "schedule.db").write_bytes(b"no database" * 100)
    assert "schedule.db cannot be used" in refract("schedule", "--list", "--state", place.state, code=1).stderr


def test_what_is_fired_is_refract_retrain(place: Workspace, refract: Run) -> None:
    place.config.write_text("tracking: {model_name: photos}\ndata: {source: nowhere}\n")
    place.was_due(timedelta(hours=1), cron="0 2 * * *")
    scheduler = place.open(
        [sys.executable, "-m", "refract", "schedule", str(place.config), "--state", str(place.state)]
    )
    until(lambda: place.book.runs(str(place.config), 1) and "ended" in place.told(), "its end", within=120)
    (run,) = place.book.runs(str(place.config), 5)
    assert run.words() == "data refused (exit code 20)" and "nowhere" in Path(run.log).read_text()
    assert "data refused (exit code 20)" in refract("schedule", "--list", "--state", place.state).stdout
    assert ended(scheduler) == 0


def test_a_cron_of_every_minute_fires_with_the_minute(place: Workspace, refract: Run) -> None:
    """The command itself, by the machine's clock; started again without a cron it goes on with the one that it had."""
    command = [sys.executable, "-m", "refract", "schedule", str(place.config), "--state", str(place.state)]
    first = place.open(
        [*command, "--cron", "* * * * *", "--timezone", "UTC", "--command", f"{sys.executable} {place.stub}"]
    )
    until(lambda: place.runs() and "done" in place.runs()[0], "a run in the first minute", within=90)
    (run,) = place.book.runs(str(place.config), 5)
    assert run.began.second < 5, "with the minute"
    assert ended(first) == 0
    again = place.open(command)
    until(lambda: place.book.alive(str(place.config), "scheduler"), "it is back")
    until(lambda: "next run" in place.told() or len(place.began()) == 2, "it knows its cron")
    assert f"command    {sys.executable} {place.stub}" in refract("schedule", "--list", "--state", place.state).stdout
    assert ended(again) == 0
