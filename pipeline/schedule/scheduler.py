"""The process that stays: APScheduler says when, each firing is a child process, and the book keeps what became of it."""

import logging
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from apscheduler.triggers.base import BaseTrigger

from refract.pipeline.files import locked
from refract.pipeline.schedule.store import DECIDED, Run, Schedule, ScheduleError, ScheduleStore, Taken

log = logging.getLogger(__name__)

RETRAIN = (sys.executable, "-m", "refract", "retrain")
RESUMES = 3
"""Times in a row that a run goes on at once after it was cut; one that takes the machine down with it then waits for its next hour."""
NOTHING_LEFT = 2
"""The exit code of `refract retrain --resume` where the run was cut before it had begun, or had ended after all."""
PEEK_S = 1.0
"""`refract schedule --list` holds a lock for a moment, to see whether it is free."""
WAKE_S = 60
"""A machine that slept, or whose clock was set, is noticed after so many seconds."""


@dataclass(frozen=True)
class Plan:
    """What is to be run, and when.

    config: absolute path; cron, zone: for the book; trigger: when; command: run with the config, and with `--resume` where it goes on;
    grace: seconds that a run may be late, None for any; keep: runs whose logs stay; resume: whether a run that was cut goes on at once.
    """

    config: Path
    cron: str
    zone: ZoneInfo
    trigger: BaseTrigger
    command: Sequence[str] = RETRAIN
    grace: float | None = None
    keep: int = 30
    resume: bool = True


def run_scheduler(plan: Plan, book: ScheduleStore) -> int:
    """Fire until SIGTERM or Ctrl-C, which are passed to the run under way, whose end is waited for. Returns 0, after Ctrl-C 130.

    ScheduleError where the config's schedule is kept by another process already. To be called in the main thread.
    """
    with _alone(plan, book):
        runner = Runner(plan, book)
        scheduler = _scheduler(plan, book, runner)
        asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # a signal may put into it at any moment
        before = {
            number: signal.signal(number, lambda n, _: asked.put(n)) for number in (signal.SIGTERM, signal.SIGINT)
        }

        def shut_down() -> None:
            scheduler.shutdown(wait=True)
            asked.put(None)

        try:
            scheduler.start()
            first = asked.get()
            assert first is not None
            runner.stop(first)
            threading.Thread(target=shut_down, daemon=True).start()
            while (number := asked.get()) is not None:
                runner.stop(number)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        log.info("the scheduler ends, by %s", signal.Signals(first).name)
        return 130 if first == signal.SIGINT else 0


class Runner:
    """Runs the command, once at a time, and passes signals to it."""

    def __init__(self, plan: Plan, book: ScheduleStore) -> None:
        self.plan, self.book = plan, book
        self.config = str(plan.config)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None

    def left(self) -> Run | None:
        """The last run, if it was cut or stopped, and may go on now."""
        last = self.book.runs(self.config, RESUMES + 1)
        open_ones = [run for run in last if run.state in ("running", "cut", "stopped")]
        return last[0] if last and last[0] in open_ones and len(open_ones) <= RESUMES else None

    def fire(self) -> None:
        """One run from beginning to end. Nothing is raised: whatever goes wrong is told, and the next time comes."""
        try:
            with self._held() as handle:
                if handle is not None:
                    self._run(handle)
        except (OSError, ScheduleError) as error:
            log.error("no run: %s", error)

    def stop(self, number: int) -> None:
        """Begin no run any more; pass the signal to the one under way."""
        with self._lock:
            self._stopping.set()
            if self._child is not None:
                log.info("passing %s to the run under way, and waiting for its end", signal.Signals(number).name)
                self._child.send_signal(number)

    @contextmanager
    def _held(self) -> Iterator[int | None]:
        """The lock of the run, which the child shares; None where a child that outlived its scheduler had it, whose end was waited for."""
        handle = os.open(self.book.lock(self.config, "run"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            until = time.monotonic() + PEEK_S
            while not (free := _try_lock(handle)) and time.monotonic() < until:
                time.sleep(0.05)
            if not free:
                log.warning("a run that outlived its scheduler is still under way: its end is waited for")
                while not free and not self._stopping.wait(0.2):
                    free = _try_lock(handle)
                last = self.book.runs(self.config, 1)
                if free and last and last[0].state == "running":
                    self.book.end(last[0].id, "unseen", None)
                    log.info("it has ended; what became of it its log tells: %s", last[0].log)
                yield None
            else:
                yield handle
        finally:
            os.close(handle)

    def _run(self, handle: int) -> None:
        left = self.left() if self.plan.resume else None
        for run in self.book.runs(self.config, 1):
            if run.state == "running":
                self.book.cut(run.id)
        code = self._once(handle, resume=left is not None)
        if left is not None and code == NOTHING_LEFT and not self._stopping.is_set():
            log.info("there was nothing to go on with: a run begins anew")
            self._once(handle, resume=False)

    def _once(self, handle: int, *, resume: bool) -> int | None:
        """The exit code, None where the scheduler was to stop before the run began."""
        began = time.monotonic()
        path = self.book.folder / f"{self.plan.config.stem}-{datetime.now(self.plan.zone):%Y%m%d-%H%M%S-%f}.log"
        number = self.book.begin(self.config, path, self.plan.keep)
        command = [*self.plan.command, self.config, *(["--resume"] if resume else [])]
        state, code = "ended", None
        try:
            with path.open("ab") as output, self._lock:
                if self._stopping.is_set():
                    state = "stopped"
                    return None
                # A group of its own: a terminal's Ctrl-C reaches it through `stop` only, as SIGTERM does.
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[handle],
                )
            log.info("%s %s: process %d, log %s", "goes on" if resume else "begins", self._now(), self._child.pid, path)
            code = self._child.wait()
            if self._stopping.is_set() and code not in DECIDED:
                state = "stopped"
        finally:
            with self._lock:
                self._child = None
            self.book.end(number, state, code)
        told = self.book.runs(self.config, 1)[0].words(own=tuple(self.plan.command) == RETRAIN)
        log.info("ended %s, after %s: %s", self._now(), timedelta(seconds=round(time.monotonic() - began)), told)
        return code

    def _now(self) -> str:
        return f"{datetime.now(self.plan.zone):%Y-%m-%d %H:%M:%S}"


def _scheduler(plan: Plan, book: ScheduleStore, runner: Runner) -> Any:
    """APScheduler with the one job, due when the book says, or at once where a run is to go on."""
    from apscheduler.events import EVENT_JOB_MAX_INSTANCES, EVENT_JOB_MISSED, EVENT_JOB_SUBMITTED
    from apscheduler.schedulers.background import BackgroundScheduler

    config, due = str(plan.config), _due(plan, book, runner)
    command = "" if tuple(plan.command) == RETRAIN else shlex.join(plan.command)
    book.write(Schedule(config, plan.cron, str(plan.zone), command, due, os.getpid()))
    logging.getLogger("apscheduler").setLevel(logging.CRITICAL)  # what it has to say is said here, in words
    scheduler = BackgroundScheduler(timezone=UTC)

    def note(event: Any) -> None:
        if getattr(event, "job_id", None) != "retrain":
            return
        late = [event.scheduled_run_time] if event.code == EVENT_JOB_MISSED else event.scheduled_run_times
        times = ", ".join(f"{when.astimezone(plan.zone):%Y-%m-%d %H:%M:%S}" for when in late)
        if event.code == EVENT_JOB_MISSED:
            log.warning("the run of %s is left out: it is more than %g s late", times, plan.grace)
        elif event.code == EVENT_JOB_MAX_INSTANCES:
            log.warning("the run of %s is left out: the one before is still under way", times)
        job = scheduler.get_job("retrain")
        if event.code != EVENT_JOB_MISSED:
            book.is_due(config, job.next_run_time if job else None)

    scheduler.add_listener(note, EVENT_JOB_SUBMITTED | EVENT_JOB_MISSED | EVENT_JOB_MAX_INSTANCES)
    grace = None if plan.grace is None else max(1, round(plan.grace))
    scheduler.add_job(
        runner.fire,
        plan.trigger,
        id="retrain",
        next_run_time=due,
        coalesce=True,
        max_instances=1,
        misfire_grace_time=grace,
    )
    scheduler.add_job(int, "interval", seconds=WAKE_S, id="wake", coalesce=True, misfire_grace_time=None)
    return scheduler


def _due(plan: Plan, book: ScheduleStore, runner: Runner) -> datetime | None:
    """When the first run is due: at once where one was cut, at the time that the book has where that is of this cron, else as cron says."""
    now = datetime.now(UTC)
    known = next((one for one in book.schedules() if one.config == str(plan.config)), None)
    left = runner.left()
    if book.alive(str(plan.config), "run"):
        return now  # a run without its scheduler: firing waits for its end
    if left is not None and plan.resume:
        log.warning(
            "the run of %s was %s: it goes on at once",
            f"{left.began.astimezone(plan.zone):%Y-%m-%d %H:%M:%S}",
            "stopped with its scheduler" if left.state == "stopped" else "cut short",
        )
        return now
    if known is not None and known.due is not None and (known.cron, known.zone) == (plan.cron, str(plan.zone)):
        due = known.due
        if due <= now:
            log.warning("a run was due on %s, while no scheduler ran", f"{due.astimezone(plan.zone):%Y-%m-%d %H:%M:%S}")
            return due
    due = plan.trigger.get_next_fire_time(None, now)
    log.info("%s: %s; next run %s", plan.config, plan.cron, f"{due.astimezone(plan.zone):%Y-%m-%d %H:%M:%S %Z}")
    return due


@contextmanager
def _alone(plan: Plan, book: ScheduleStore) -> Iterator[None]:
    path = book.lock(str(plan.config), "scheduler")
    other = [one.process for one in book.schedules() if one.config == str(plan.config)]
    taken = Taken(
        f"{plan.config} has a scheduler already, process {other[0] if other else 'not known'}; it is left to that one"
    )
    until = time.monotonic() + PEEK_S
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path, taken))
                break
            except Taken:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        yield


def _try_lock(handle: int) -> bool:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
