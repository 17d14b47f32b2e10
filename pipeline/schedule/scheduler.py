"""The scheduler process: APScheduler sets the times, each run is a child process, and the schedule store records the results."""

import logging
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from apscheduler.triggers.base import BaseTrigger

from refract.pipeline.files import locked
from refract.pipeline.schedule.store import DECIDED, NO_MARKS, Run, Schedule, ScheduleError, ScheduleStore, Taken
from refract.pipeline.schedule.triggers import CHECK_S, MIN_INTERVAL_S, Trigger, Watch
from refract.pipeline.webhooks.outbox import Outbox

log = logging.getLogger(__name__)

RETRAIN = (sys.executable, "-m", "refract", "retrain")
RESUMES = 3
"""How often in a row an interrupted run is resumed at once. After that it waits for its next time, in case it crashes the machine."""
NOTHING_LEFT = 2
"""The exit code of `refract retrain --resume` if the interrupted run had not started, or had finished."""
PEEK_S = 1.0
"""Seconds to retry a lock, as `refract schedule --list` holds it briefly to test whether it is free."""
WAKE_S = 60
"""Seconds until the scheduler notices that the machine slept or that its clock was set."""


@dataclass(frozen=True)
class Plan:
    """The command of a schedule, its times and its triggers.

    config: absolute path; cron, zone: for the store, cron is empty without one; trigger: the times of cron, None without one; command:
    called with the config, and with `--resume` to resume; grace: seconds that a run may be late, None without a limit; keep: number of runs
    whose logs are kept; resume: whether an interrupted run resumes at once; triggers: further reasons to start, checked every `check_s`
    seconds; min_interval_s: as in `Watch`; outbox: events that wait for their webhook, None without one.
    """

    config: Path
    cron: str
    zone: ZoneInfo
    trigger: BaseTrigger | None
    command: Sequence[str] = RETRAIN
    grace: float | None = None
    keep: int = 30
    resume: bool = True
    triggers: Sequence[Trigger] = ()
    check_s: float = CHECK_S
    min_interval_s: float = MIN_INTERVAL_S
    outbox: Outbox | None = None


def run_scheduler(plan: Plan, store: ScheduleStore) -> int:
    """Start runs until SIGTERM or Ctrl-C. The signal is forwarded to the active run, and the function waits for its end.

    Returns 0, or 130 after Ctrl-C. ScheduleError if another process schedules the config. Call it in the main thread.
    """
    with _alone(plan, store):
        signals: queue.SimpleQueue[int | None] = (
            queue.SimpleQueue()
        )  # reentrant, so that signal handlers can put into it
        # Before the log announces the next run: a signal after that line ends the scheduler in order, and the schedule is stored.
        before = {
            number: signal.signal(number, lambda n, _: signals.put(n)) for number in (signal.SIGTERM, signal.SIGINT)
        }

        try:
            runner = Runner(plan, store)
            scheduler = _scheduler(plan, store, runner)

            def shut_down() -> None:
                scheduler.shutdown(wait=True)
                signals.put(None)

            scheduler.start()
            first = signals.get()
            assert first is not None
            runner.stop(first)
            threading.Thread(target=shut_down, daemon=True).start()
            while (number := signals.get()) is not None:
                runner.stop(number)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        log.info("the scheduler stops, by %s", signal.Signals(first).name)
        return 130 if first == signal.SIGINT else 0


class Runner:
    """Runs the command, one process at a time, and forwards signals to it."""

    def __init__(self, plan: Plan, store: ScheduleStore) -> None:
        self.plan, self.store = plan, store
        self.config = str(plan.config)
        self.watch = Watch(self.config, plan.triggers, store, plan.min_interval_s)
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()
        self._stopping = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None

    def interrupted(self) -> Run | None:
        """Return the last run if it was interrupted or stopped, and may resume now."""
        last = self.store.runs(self.config, RESUMES + 1)
        unfinished = [run for run in last if run.state in ("running", "cut", "stopped")]
        return last[0] if last and last[0] in unfinished and len(unfinished) <= RESUMES else None

    def check(self) -> None:
        """Check the triggers, and start a run if one is due. Errors are logged, not raised, so that the schedule continues."""
        if self._stopping.is_set():
            return
        is_active = self._one_at_a_time.locked()  # such a run may take in what is read now, and end before this check
        try:
            reason = self.watch.check(datetime.now(UTC))
        except ScheduleError as error:
            log.error("triggers: %s", error)
            return
        except Exception:  # APScheduler would drop it, and the next check may succeed
            log.exception("triggers: an error of Refract itself; please report it with these lines")
            return
        if reason is not None and not (is_active or self._one_at_a_time.locked() or self._stopping.is_set()):
            self.fire(reason)

    def fire(self, reason: str = "cron") -> None:
        """Start a run and wait for its end. Errors are logged, not raised, so that the schedule continues."""
        if not self._one_at_a_time.acquire(blocking=False):
            log.warning("the run by %s is skipped: the previous one is still active", reason)
            return
        try:
            with self._held() as handle:
                if handle is not None:
                    self._run(handle, reason)
        except (OSError, ScheduleError) as error:
            log.error("no run: %s", error)
        finally:
            self._one_at_a_time.release()

    def stop(self, number: int) -> None:
        """Start no more runs, and forward the signal to the active one."""
        for trigger in self.plan.triggers:
            trigger.stop()
        with self._lock:
            self._stopping.set()
            if self._child is not None:
                log.info("forwarding %s to the active run, and waiting for its end", signal.Signals(number).name)
                self._child.send_signal(number)

    @contextmanager
    def _held(self) -> Iterator[int | None]:
        """Hold the run's lock, which the child inherits. Yields its file descriptor.

        Yields None after waiting for a run that outlived its scheduler and held the lock.
        """
        handle = os.open(self.store.lock(self.config, "run"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            deadline = time.monotonic() + PEEK_S
            while not (free := _try_lock(handle)) and time.monotonic() < deadline:
                time.sleep(0.05)
            if not free:
                log.warning("a run that outlived its scheduler is still active; waiting for its end")
                while not free and not self._stopping.wait(0.2):
                    free = _try_lock(handle)
                last = self.store.runs(self.config, 1)
                if free and last and last[0].state == "running":
                    self.store.end(last[0].id, "unseen", None)
                    log.info("the run has ended; its log: %s", last[0].log)
                yield None
            else:
                yield handle
        finally:
            os.close(handle)

    def _run(self, handle: int, reason: str) -> None:
        marks: Mapping[str, str] = self.store.marks(self.config)
        interrupted = self.interrupted() if self.plan.resume else None
        for run in self.store.runs(self.config, 1):
            if run.state == "running":
                self.store.cut(run.id)
        if interrupted is None:
            self._once(handle, reason, marks, resume=False)
            return
        # It takes in what was measured at its first start: later labels and data are for the next run.
        reason = interrupted.reason or reason
        code = self._once(handle, reason, interrupted.marks, resume=True)
        if code == NOTHING_LEFT and not self._stopping.is_set():
            log.info("there was nothing to resume; a new run starts")
            self._once(handle, reason, marks, resume=False)

    def _once(self, handle: int, reason: str, marks: Mapping[str, str] = NO_MARKS, *, resume: bool) -> int | None:
        """Start the command and return its exit code; None if the scheduler stops before. reason, marks: as in `Run`."""
        start = time.monotonic()
        path = self.store.folder / f"{self.plan.config.stem}-{datetime.now(self.plan.zone):%Y%m%d-%H%M%S-%f}.log"
        number = self.store.begin(self.config, path, self.plan.keep, reason=reason, marks=marks)
        command = [*self.plan.command, self.config, *(["--resume"] if resume else [])]
        state, code = "ended", None
        try:
            with path.open("ab") as output, self._lock:
                if self._stopping.is_set():
                    state = "stopped"
                    return None
                # In a separate process group, so that a terminal's Ctrl-C reaches it through `stop` only, as SIGTERM does.
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[handle],
                )
            started = "resumed" if resume else "started"
            log.info("%s %s by %s: process %d, log %s", started, self._now(), reason, self._child.pid, path)
            code = self._child.wait()
            if self._stopping.is_set() and code not in DECIDED:
                state = "stopped"
        finally:
            with self._lock:
                self._child = None
            self.store.end(number, state, code)
        result = self.store.runs(self.config, 1)[0].words(is_retrain=tuple(self.plan.command) == RETRAIN)
        log.info("ended %s, after %s: %s", self._now(), timedelta(seconds=round(time.monotonic() - start)), result)
        return code

    def _now(self) -> str:
        return f"{datetime.now(self.plan.zone):%Y-%m-%d %H:%M:%S}"


def _scheduler(plan: Plan, store: ScheduleStore, runner: Runner) -> Any:
    """Build the APScheduler.

    Its job `retrain` is due at the stored time, or at once if a run resumes; its job `check` reads the triggers.
    """
    from apscheduler.events import EVENT_JOB_MAX_INSTANCES, EVENT_JOB_MISSED, EVENT_JOB_SUBMITTED
    from apscheduler.schedulers.background import BackgroundScheduler

    config, due = str(plan.config), _due(plan, store, runner)
    command = "" if tuple(plan.command) == RETRAIN else shlex.join(plan.command)
    store.write(Schedule(config, plan.cron, str(plan.zone), command, due, os.getpid()))
    store.set_triggers(config, {trigger.name: trigger.argument for trigger in plan.triggers})
    logging.getLogger("apscheduler").setLevel(logging.CRITICAL)  # `note` logs its events in plain text
    scheduler = BackgroundScheduler(timezone=UTC)

    def note(event: Any) -> None:
        if getattr(event, "job_id", None) != "retrain":
            return
        late = [event.scheduled_run_time] if event.code == EVENT_JOB_MISSED else event.scheduled_run_times
        times = ", ".join(f"{when.astimezone(plan.zone):%Y-%m-%d %H:%M:%S}" for when in late)
        if event.code == EVENT_JOB_MISSED:
            log.warning("the run of %s is skipped: it is more than %g s late", times, plan.grace)
        elif event.code == EVENT_JOB_MAX_INSTANCES:
            log.warning("the run of %s is skipped: the previous one is still active", times)
        job = scheduler.get_job("retrain")
        if event.code != EVENT_JOB_MISSED:
            store.is_due(config, job.next_run_time if job else None)

    scheduler.add_listener(note, EVENT_JOB_SUBMITTED | EVENT_JOB_MISSED | EVENT_JOB_MAX_INSTANCES)
    grace = None if plan.grace is None else max(1, round(plan.grace))
    if plan.trigger is not None:
        scheduler.add_job(
            runner.fire,
            plan.trigger,
            id="retrain",
            next_run_time=due,
            coalesce=True,
            max_instances=1,
            misfire_grace_time=grace,
        )
    elif due is not None:  # a run that resumes, or that is still active
        scheduler.add_job(runner.fire, "date", run_date=due, id="retrain", misfire_grace_time=None)
    if plan.triggers:
        scheduler.add_job(
            runner.check,
            "interval",
            seconds=plan.check_s,
            id="check",
            next_run_time=datetime.now(UTC),
            coalesce=True,
            max_instances=1,
            misfire_grace_time=None,
        )
    if plan.outbox is not None:
        scheduler.add_job(
            plan.outbox.deliver_in_background,  # so that a server that hangs does not delay the scheduler's end
            "interval",
            kwargs={"early": False},
            seconds=WAKE_S,
            next_run_time=datetime.now(UTC),
            coalesce=True,
            misfire_grace_time=None,
        )
    scheduler.add_job(int, "interval", seconds=WAKE_S, id="wake", coalesce=True, misfire_grace_time=None)
    return scheduler


def _due(plan: Plan, store: ScheduleStore, runner: Runner) -> datetime | None:
    """Return when the first run is due: at once to resume one, else at the stored time if it is of this cron, else by the cron."""
    now = datetime.now(UTC)
    stored = next((one for one in store.schedules() if one.config == str(plan.config)), None)
    interrupted = runner.interrupted()
    if store.alive(str(plan.config), "run"):
        return now  # a run outlived its scheduler: `fire` waits for its end
    if interrupted is not None and plan.resume:
        log.warning(
            "the run of %s was %s; it resumes now",
            f"{interrupted.began.astimezone(plan.zone):%Y-%m-%d %H:%M:%S}",
            "stopped with its scheduler" if interrupted.state == "stopped" else "interrupted",
        )
        return now
    if plan.trigger is None:
        log.info("%s: checked every %g s: %s", plan.config, plan.check_s, ", ".join(one.name for one in plan.triggers))
        return None
    if stored is not None and stored.due is not None and (stored.cron, stored.zone) == (plan.cron, str(plan.zone)):
        due = stored.due
        if due <= now:
            log.warning(
                "a run was due on %s, when no scheduler was active", f"{due.astimezone(plan.zone):%Y-%m-%d %H:%M:%S}"
            )
            return due
    due = plan.trigger.get_next_fire_time(None, now)
    log.info("%s: %s; next run %s", plan.config, plan.cron, f"{due.astimezone(plan.zone):%Y-%m-%d %H:%M:%S %Z}")
    return due


@contextmanager
def _alone(plan: Plan, store: ScheduleStore) -> Iterator[None]:
    """Hold the lock of the config's scheduler. Taken if another process holds it."""
    path = store.lock(str(plan.config), "scheduler")
    other = [one.process for one in store.schedules() if one.config == str(plan.config)]
    taken = Taken(f"{plan.config} already has a scheduler, process {other[0] if other else 'unknown'}; stop it first")
    deadline = time.monotonic() + PEEK_S
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path, taken))
                break
            except Taken:
                if time.monotonic() > deadline:
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
