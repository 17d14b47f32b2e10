"""`refract schedule CONFIG --cron "0 2 * * *" --on-labels 200` and `refract schedule --list`"""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING

from refract import output
from refract.pipeline import console

if TYPE_CHECKING:
    from refract.pipeline.schedule.store import Schedule, ScheduleStore, TriggerState
    from refract.pipeline.schedule.triggers import Trigger
    from refract.pipeline.webhooks.outbox import Outbox

STATE = Path("runs/schedule")
SHOWN = 5


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="refract schedule",
        description="Run until it is stopped, and start `refract retrain CONFIG` at the times of a cron expression, when enough labels "
        "were corrected, or when new data drift, each run as a separate process with its own log. The schedule and its runs are stored, "
        "so that a schedule survives restarts. Of several missed runs one is started late. A run that was interrupted or stopped with the "
        "scheduler is resumed at its next start. SIGTERM and Ctrl-C are forwarded to the active run, and the scheduler waits for its end. "
        "Exit codes: 0 stopped by SIGTERM; 1 failed, or another process schedules CONFIG; 2 the input cannot be used; 130 stopped by "
        "Ctrl-C.",
    )
    parser.add_argument("config", nargs="?", type=Path, help="config file of `refract retrain`")
    parser.add_argument(
        "--cron", help='minute hour day month weekday, such as "0 2 * * *" (default: the stored schedule of CONFIG)'
    )
    parser.add_argument(
        "--on-labels",
        type=int,
        metavar="N",
        help="start a run when decisions in the label history of data.labels have changed N images since the last run",
    )
    parser.add_argument(
        "--on-drift",
        metavar="DATA",
        help="start a run when DATA drift from the champion: a server's sampled inputs (refract serve --sample), or new data as for "
        "`refract drift`",
    )
    parser.add_argument(
        "--drift-level", choices=("warn", "stop"), help="level of --on-drift from which a run starts (default: warn)"
    )
    parser.add_argument(
        "--check-s", type=float, default=300.0, help="seconds between two checks of --on-labels and --on-drift (300)"
    )
    parser.add_argument(
        "--min-interval-s",
        type=float,
        default=3600.0,
        help="smallest time in seconds from the start of a run to the next start by --on-labels or --on-drift (3600)",
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
    if args.on_labels is not None and args.on_labels < 1:
        parser.error(f"--on-labels {args.on_labels}: expected at least 1")
    if args.drift_level is not None and args.on_drift is None:
        parser.error("--drift-level: expected together with --on-drift")
    if not 1 <= args.check_s <= 86400:
        parser.error(f"--check-s {args.check_s:g}: expected seconds from 1 to 86400")
    if not 0 <= args.min_interval_s < 1e9:
        parser.error(f"--min-interval-s {args.min_interval_s:g}: expected seconds of at least 0 and below 1e9")
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
    arguments = _arguments_of_triggers(args, store, config)
    is_new = args.cron is not None or args.on_labels is not None or args.on_drift is not None
    if is_new:
        cron_text, zone_name, command_text = args.cron or "", args.timezone, args.command
    elif stored is not None and (
        stored.cron or arguments
    ):  # neither is stored if its process was killed while it stored them
        cron_text, zone_name = stored.cron, args.timezone or stored.zone
        command_text = args.command or stored.command
    else:
        raise ConfigError(
            f'{args.config} has no stored schedule; add --cron, such as --cron "0 2 * * *", --on-labels or --on-drift'
        )
    zone = zone_named(zone_name)
    cron = Cron(cron_text, zone) if cron_text or args.cron is not None else None
    try:
        command = shlex.split(command_text or "") or RETRAIN
    except ValueError as error:
        raise ConfigError(f"--command: {args.command!r}: {error}") from error
    plan = Plan(
        config,
        cron.text if cron else "",
        zone,
        cron,
        command,
        args.grace_s,
        args.keep,
        not args.no_resume,
        _triggers(config, arguments, checks=command is RETRAIN),
        args.check_s,
        args.min_interval_s,
        _outbox(config) if command is RETRAIN else None,
    )
    return run_scheduler(plan, store)


def _arguments_of_triggers(args: argparse.Namespace, store: "ScheduleStore", config: Path) -> dict[str, str]:
    """Return trigger → its argument: those of the options, or the stored ones without any option that says when runs start."""
    given: dict[str, str] = {}
    if args.on_labels is not None:
        given["labels"] = str(args.on_labels)
    if args.on_drift is not None:
        given["drift"] = json.dumps([args.on_drift, args.drift_level or "warn"], ensure_ascii=False)
    if given or args.cron is not None:
        return given
    return {one.name: one.argument for one in store.triggers(str(config))}


def _outbox(config_file: Path) -> "Outbox | None":
    """Return the outbox whose waiting events the scheduler delivers."""
    from refract.pipeline.config.config import load_config
    from refract.pipeline.retraining.notification import outbox

    return outbox(load_config(config_file, []))


def _triggers(config_file: Path, arguments: Mapping[str, str], *, checks: bool) -> "list[Trigger]":
    """Build the triggers. checks: refuse a config that `refract retrain` refuses now, not at the first run."""
    if not (arguments or checks):
        return []
    from refract.pipeline.config.config import load_config
    from refract.pipeline.retraining.workspace import workspace_of
    from refract.pipeline.schedule.on_drift import drift_trigger
    from refract.pipeline.schedule.on_labels import label_trigger

    config = load_config(config_file, [])
    workspace = workspace_of(config)
    triggers: list[Trigger] = []
    if "labels" in arguments:
        triggers.append(label_trigger(config.data.labels, int(arguments["labels"]), workspace.root / "last.json"))
    if "drift" in arguments:
        triggers.append(drift_trigger(config_file, *json.loads(arguments["drift"])))
    return triggers


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
        store = ScheduleStore(state.resolve())
        print("\n".join(_description(store, schedule)))
        runs = [vars(run) | {"marks": dict(run.marks)} for run in store.runs(schedule.config, SHOWN)]
        output.result(
            {**vars(schedule), "triggers": [asdict(one) for one in store.triggers(schedule.config)], "runs": runs}
        )
    return 0


def _description(store: "ScheduleStore", schedule: "Schedule") -> Sequence[str]:
    from zoneinfo import ZoneInfo

    from refract.pipeline.schedule.store import LOCAL

    zone = ZoneInfo(schedule.zone) if schedule.zone != LOCAL else None
    alive, now = store.alive(schedule.config, "scheduler"), datetime.now(UTC)
    runs = store.runs(schedule.config, SHOWN)
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
        *([f"  cron       {schedule.cron} ({schedule.zone})"] if schedule.cron else []),
        *(_trigger_line(one, zone) for one in store.triggers(schedule.config)),
        f"  scheduler  {f'active, process {schedule.process}' if alive else 'not running'}",
        *([f"  next       {due}"] if schedule.cron or schedule.due else []),
        *([f"  last start by {runs[0].reason}"] if runs and runs[0].reason else []),
        *([f"  command    {schedule.command}"] if schedule.command else []),
    ]
    for run in runs:
        took = _long((run.ended or now) - run.began) if run.ended or run.state == "running" else "?"
        words = run.words(is_retrain=not schedule.command)
        if run.state == "running" and not store.alive(schedule.config, "run"):
            words, took = "interrupted", "?"
        lines.append(f"  {run.began.astimezone(zone):%Y-%m-%d %H:%M:%S}  {took:>10}  {words}; {run.log}")
    return lines


def _trigger_line(trigger: "TriggerState", zone: tzinfo | None) -> str:
    """Describe a trigger: its option, its last reading, and when it was checked."""
    option = trigger.argument if trigger.name == "labels" else " from level ".join(json.loads(trigger.argument))
    if trigger.reading is None or trigger.checked is None:
        return f"  on {trigger.name:<8}{option}: not checked yet"
    return f"  on {trigger.name:<8}{option}: {trigger.reading.summary}; checked {trigger.checked.astimezone(zone):%Y-%m-%d %H:%M:%S}"


def _long(span: timedelta) -> str:
    minutes, seconds = divmod(round(span.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _stored(store: "ScheduleStore", config: Path) -> "Schedule | None":
    return next((one for one in store.schedules() if one.config == str(config)), None)
