"""`refract schedule CONFIG --cron "0 2 * * *"` and `refract schedule --list`"""

import argparse
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from refract import output
from refract.pipeline.cli import console

if TYPE_CHECKING:
    from refract.pipeline.schedule.store import Schedule, ScheduleStore

STATE = Path("runs/schedule")
SHOWN = 5


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract schedule",
        description="Run until it is stopped, and start `refract retrain CONFIG` at the times of a cron expression, each run as a separate "
        "process with its own log. The schedule and its runs are stored, so that a schedule survives restarts. Of several missed runs one "
        "is started late. A run that was interrupted or stopped with the scheduler is resumed at its next start. SIGTERM and Ctrl-C are "
        "forwarded to the active run, and the scheduler waits for its end. Exit codes: 0 stopped by SIGTERM; 1 failed, or another process "
        "schedules CONFIG; 2 the input cannot be used; 130 stopped by Ctrl-C.",
    )
    parser.add_argument("config", nargs="?", type=Path, help="config file of `refract retrain`")
    parser.add_argument(
        "--cron", help='minute hour day month weekday, such as "0 2 * * *" (default: the stored schedule of CONFIG)'
    )
    parser.add_argument("--timezone", help="time zone of --cron, such as Europe/Berlin (default: this machine's)")
    parser.add_argument(
        "--grace-s",
        type=float,
        help="skip a run that is later than this many seconds (default: never skip)",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="do not resume an interrupted run; the next one starts anew"
    )
    parser.add_argument("--keep", type=int, default=30, help="number of runs whose logs are kept (30)")
    parser.add_argument(
        "--command",
        help="run this instead of `refract retrain`, such as 'nice refract retrain'; CONFIG is appended",
    )
    parser.add_argument(
        "--state", type=Path, default=STATE, help=f"folder of the schedule store and the logs ({STATE})"
    )
    parser.add_argument("--list", action="store_true", help="list the schedules, their next times and last runs")
    parser.add_argument("--forget", action="store_true", help="delete the schedule of CONFIG, but not its logs")
    args = parser.parse_args(argv)
    if args.list == (args.config is not None):
        parser.error("expected either CONFIG or --list")
    if args.keep < 1:
        parser.error(f"--keep {args.keep}: expected at least 1")
    if args.grace_s is not None and not 0 < args.grace_s < 1e9:
        parser.error(f"--grace-s {args.grace_s:g}: expected seconds above 0 and below 1e9")
    if args.list:
        return console.run("schedule", lambda: _list(args.state))
    if args.forget:
        return console.run("schedule", lambda: _forget(args.config, args.state))
    return console.run("schedule", lambda: _schedule(args))


def _schedule(args: argparse.Namespace) -> int:
    from refract.pipeline.config.config import ConfigError

    try:
        from refract.pipeline.schedule.cron import Cron, zone_named
        from refract.pipeline.schedule.scheduler import RETRAIN, Plan, run_scheduler
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; run pip install 'refract[train,retrain]'") from error
    from refract.pipeline.schedule.store import ScheduleStore

    config = (
        args.config.absolute()
    )  # not resolved: a link to the next release, such as a ConfigMap's, is the same config
    if not config.is_file():
        raise ConfigError(f"{args.config}: no such file; `refract init FOLDER -o {args.config}` writes one")
    store = ScheduleStore(args.state.resolve())
    stored = _stored(store, config)
    if args.cron is not None:
        cron_text, zone_name, command_text = args.cron, args.timezone, args.command
    elif stored is not None:
        cron_text, zone_name = stored.cron, args.timezone or stored.zone
        command_text = args.command or stored.command
    else:
        raise ConfigError(f'{args.config} has no stored schedule; add --cron, such as --cron "0 2 * * *"')
    zone = zone_named(zone_name)
    cron = Cron(cron_text, zone)
    try:
        command = shlex.split(command_text or "") or RETRAIN
    except ValueError as error:
        raise ConfigError(f"--command: {args.command!r}: {error}") from error
    if command is RETRAIN:
        from refract.pipeline.config.config import load_config
        from refract.pipeline.retraining.workspace import workspace_of

        workspace_of(load_config(config, []))  # refuse an unusable config now, not at the first run
    plan = Plan(config, cron.text, zone, cron, command, args.grace_s, args.keep, not args.no_resume)
    return run_scheduler(plan, store)


def _forget(config: Path, state: Path) -> int:
    from refract.pipeline.config.config import ConfigError
    from refract.pipeline.schedule.store import ScheduleStore

    store = ScheduleStore(state.resolve())
    stored = _stored(store, config.absolute())
    if stored is None:
        raise ConfigError(f"{config} has no schedule in {state}")
    if store.alive(stored.config, "scheduler"):
        raise ConfigError(f"{config} has a scheduler, process {stored.process}; stop it first")
    store.forget(stored.config)
    output.result({"forgot": stored.config})
    return 0


def _list(state: Path) -> int:
    from refract.pipeline.schedule.store import FILE, ScheduleStore

    schedules = ScheduleStore(state.resolve()).schedules() if (state / FILE).is_file() else []
    if not schedules:
        print(f"no schedule in {state}")
    for schedule in schedules:
        print("\n".join(_description(ScheduleStore(state.resolve()), schedule)))
        runs = ScheduleStore(state.resolve()).runs(schedule.config, SHOWN)
        output.result({**vars(schedule), "runs": [vars(run) for run in runs]})
    return 0


def _description(store: "ScheduleStore", schedule: "Schedule") -> Sequence[str]:
    from zoneinfo import ZoneInfo

    from refract.pipeline.schedule.store import LOCAL

    zone = ZoneInfo(schedule.zone) if schedule.zone != LOCAL else None
    alive, now = store.alive(schedule.config, "scheduler"), datetime.now(UTC)
    due = f"{schedule.due.astimezone(zone):%Y-%m-%d %H:%M %Z}" if schedule.due else "never"
    if not alive:
        due += (
            ", if the scheduler is started by then"
            if schedule.due and schedule.due > now
            else ", missed; it runs when the scheduler is started"
        )
    elif schedule.due and schedule.due > now:
        due += f", in {_long(schedule.due - now)}"
    lines = [
        schedule.config,
        f"  cron       {schedule.cron} ({schedule.zone})",
        f"  scheduler  {f'active, process {schedule.process}' if alive else 'not running'}",
        f"  next       {due}",
        *([f"  command    {schedule.command}"] if schedule.command else []),
    ]
    for run in store.runs(schedule.config, SHOWN):
        took = _long((run.ended or now) - run.began) if run.ended or run.state == "running" else "?"
        words = run.words(is_retrain=not schedule.command)
        if run.state == "running" and not store.alive(schedule.config, "run"):
            words, took = "interrupted", "?"
        lines.append(f"  {run.began.astimezone(zone):%Y-%m-%d %H:%M:%S}  {took:>10}  {words}; {run.log}")
    return lines


def _long(span: timedelta) -> str:
    minutes, seconds = divmod(round(span.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _stored(store: "ScheduleStore", config: Path) -> "Schedule | None":
    return next((one for one in store.schedules() if one.config == str(config)), None)
