"""`refract schedule CONFIG --cron "0 2 * * *"` and `refract schedule --list`"""

import argparse
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from refract.pipeline.cli import console

if TYPE_CHECKING:
    from refract.pipeline.schedule.store import Schedule, ScheduleStore

STATE = Path("runs/schedule")
SHOWN = 5


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract schedule",
        description="Stay, and start `refract retrain CONFIG` by the clock, each time as a process of its own with a log of its own. What "
        "is due and what ran is kept: a schedule survives restarts, and of the runs that were missed meanwhile one is made up for. A run "
        "that was cut or stopped with the scheduler goes on, by `--resume`, when it starts again. SIGTERM and Ctrl-C are passed to the "
        "run under way, whose end is waited for. Exit codes: 0 stopped by SIGTERM, 1 failed or kept by another process already, 2 the "
        "input cannot be used, 130 stopped by Ctrl-C.",
    )
    parser.add_argument("config", nargs="?", type=Path, help="as for `refract retrain`")
    parser.add_argument(
        "--cron", help='minute hour day month weekday, as "0 2 * * *"; without it, as this config was scheduled before'
    )
    parser.add_argument("--timezone", help="of the cron, as Europe/Berlin; without it this machine's")
    parser.add_argument(
        "--grace-s",
        type=float,
        help="a run that is later than this is left out; without it, it is made up for however late",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="leave a run that was cut as it is; the next one begins anew"
    )
    parser.add_argument("--keep", type=int, default=30, help="runs whose logs stay (30)")
    parser.add_argument(
        "--command",
        help="what is started instead of `refract retrain`, as 'nice refract retrain'; CONFIG is put behind it",
    )
    parser.add_argument("--state", type=Path, default=STATE, help=f"the folder of what is kept, logs too ({STATE})")
    parser.add_argument(
        "--list", action="store_true", help="the schedules here, when they are due, and their last runs"
    )
    parser.add_argument("--forget", action="store_true", help="take CONFIG out of that list; its logs stay")
    args = parser.parse_args(argv)
    if args.list == (args.config is not None):
        parser.error("either a CONFIG or --list is wanted")
    if args.keep < 1 or (args.grace_s is not None and not 0 < args.grace_s < 1e9):
        parser.error("--keep takes a count of at least 1, --grace-s a number of seconds above 0")
    if args.list:
        return console.run("schedule", lambda: _list(args.state))
    if args.forget:
        return console.run("schedule", lambda: _forget(args.config, args.state))
    return console.run("schedule", lambda: _keep(args))


def _keep(args: argparse.Namespace) -> int:
    from refract.pipeline.config.config import ConfigError

    try:
        from refract.pipeline.schedule.cron import Cron, zone_named
        from refract.pipeline.schedule.scheduler import RETRAIN, Plan, run_scheduler
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; pip install refract[train,retrain]") from error
    from refract.pipeline.schedule.store import ScheduleStore

    config = args.config.absolute()  # a link that is moved to the next release, as a ConfigMap's, is the same config
    if not config.is_file():
        raise ConfigError(f"{args.config}: there is no such file")
    book = ScheduleStore(args.state.resolve())
    known = _known(book, config)
    if args.cron is not None:
        asked = (args.cron, args.timezone, args.command)
    elif known is not None:
        asked = (known.cron, args.timezone or known.zone, args.command or known.command)
    else:
        raise ConfigError(f'{args.config} was not scheduled before: --cron is wanted, as --cron "0 2 * * *"')
    zone = zone_named(asked[1])
    cron = Cron(asked[0], zone)
    try:
        command = shlex.split(asked[2] or "") or RETRAIN
    except ValueError as error:
        raise ConfigError(f"--command: {args.command!r}: {error}") from error
    if command is RETRAIN:
        from refract.pipeline.config.config import load_config
        from refract.pipeline.retraining.workspace import workspace_of

        workspace_of(load_config(config, []))  # what it would refuse at night, it refuses now
    plan = Plan(config, cron.text, zone, cron, command, args.grace_s, args.keep, not args.no_resume)
    return run_scheduler(plan, book)


def _forget(config: Path, state: Path) -> int:
    from refract.pipeline.config.config import ConfigError
    from refract.pipeline.schedule.store import ScheduleStore

    book = ScheduleStore(state.resolve())
    known = _known(book, config.resolve())
    if known is None:
        raise ConfigError(f"{config} is not scheduled here")
    if book.alive(known.config, "scheduler"):
        raise ConfigError(f"{config} has a scheduler, process {known.process}: stop that first")
    book.forget(known.config)
    return 0


def _list(state: Path) -> int:
    from refract.pipeline.schedule.store import FILE, ScheduleStore

    schedules = ScheduleStore(state.resolve()).schedules() if (state / FILE).is_file() else []
    if not schedules:
        print(f"no schedule in {state}")
    for schedule in schedules:
        print("\n".join(_told(ScheduleStore(state.resolve()), schedule)))
    return 0


def _told(book: "ScheduleStore", schedule: "Schedule") -> Sequence[str]:
    from zoneinfo import ZoneInfo

    from refract.pipeline.schedule.store import LOCAL

    zone = ZoneInfo(schedule.zone) if schedule.zone != LOCAL else None
    alive, now = book.alive(schedule.config, "scheduler"), datetime.now(UTC)
    due = f"{schedule.due.astimezone(zone):%Y-%m-%d %H:%M %Z}" if schedule.due else "never"
    if not alive:
        due += (
            ", once it is started again"
            if schedule.due and schedule.due > now
            else ", and missed; made up for by its next start"
        )
    elif schedule.due and schedule.due > now:
        due += f", in {_long(schedule.due - now)}"
    lines = [
        schedule.config,
        f"  cron       {schedule.cron} ({schedule.zone})",
        f"  scheduler  {f'alive, process {schedule.process}' if alive else 'not running'}",
        f"  next       {due}",
        *([f"  command    {schedule.command}"] if schedule.command else []),
    ]
    for run in book.runs(schedule.config, SHOWN):
        took = _long((run.ended or now) - run.began) if run.ended or run.state == "running" else "?"
        words = run.words(own=not schedule.command)
        if run.state == "running" and not book.alive(schedule.config, "run"):
            words, took = "cut short", "?"
        lines.append(f"  {run.began.astimezone(zone):%Y-%m-%d %H:%M:%S}  {took:>10}  {words}; {run.log}")
    return lines


def _long(span: timedelta) -> str:
    minutes, seconds = divmod(round(span.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _known(book: "ScheduleStore", config: Path) -> "Schedule | None":
    return next((one for one in book.schedules() if one.config == str(config)), None)
