"""`refract retrain CONFIG [--section.key value …]`"""

import logging
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

from refract import output
from refract.models.credentials import masked
from refract.pipeline import console

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""What `console.run` returns after Ctrl-C."""

USAGE = """usage: refract retrain CONFIG.yaml [--section.key value …] [--force]
       refract retrain CONFIG.yaml --resume

Retrain once, from data to decision: take a snapshot of the data, compare it with the last accepted run's, train, evaluate, register
the version as `challenger`, compare it with the champion on the frozen holdout, and promote it if it is better.
tracking.model_name names the registered model.

  --resume            resume the newest run, which was interrupted: finished steps are skipped, training resumes from its checkpoint
  --resume-or-begin   for unattended use: the same, or start a new run if none was interrupted, if the config has changed, or if
                      the run failed three times
  --force             train even if data, config and code are those of the last run, which otherwise ends at once

Exit codes: 0 promoted, or nothing had changed; 10 trained, but not promoted; 20 data refused; 30 failed, resume with --resume;
2 the config cannot be used, or another run of the model is in progress."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    flags = {flag: flag in argv for flag in ("--resume", "--resume-or-begin", "--force")}
    rest = [argument for argument in argv if argument not in flags]
    if not rest or rest[0].startswith("--"):
        first = rest[0] if rest else "no config file"
        print(f"refract retrain: got {first}; the config file comes first, then options", file=sys.stderr)
        return 2
    if flags["--resume"] and (len(rest) > 1 or flags["--force"]):
        print(
            "refract retrain: --resume uses the run's stored config; give the config file without options",
            file=sys.stderr,
        )
        return 2
    options = {name[2:].replace("-", "_"): is_set for name, is_set in flags.items()}
    return console.run("retrain", lambda: _retrain(rest, **options))


def _retrain(argv: list[str], *, resume: bool, resume_or_begin: bool, force: bool) -> int:
    from refract.pipeline.config.config import ConfigError, load_config
    from refract.pipeline.retraining.notification import notify, outbox
    from refract.pipeline.retraining.run import begin, run_config, unfinished, worth_resuming
    from refract.pipeline.retraining.steps import Outcome
    from refract.pipeline.retraining.trainings import join_training
    from refract.pipeline.retraining.workspace import RUN_RECORD, read_run, workspace_of
    from refract.pipeline.tracking.address import check_address, tracking_uri
    from refract.pipeline.training.ranks import is_further_rank

    config = load_config(argv[0], argv[1:])
    workspace = workspace_of(config)
    outbox(config)
    uri = tracking_uri(config.tracking)
    check_address(uri)
    if masked(uri) != uri:
        os.environ["MLFLOW_TRACKING_URI"] = uri  # the run's stored config has no credentials
    if is_further_rank() and (running := unfinished(workspace)) is not None:  # rank 0 holds the lock and does the rest
        join_training(running)
        return 0
    with workspace.held():
        interrupted = unfinished(workspace)
        if resume and interrupted is None:
            raise ConfigError(f"--resume: {workspace.root} has no interrupted run; start one without --resume")
        resumes = interrupted is not None and (resume or (resume_or_begin and worth_resuming(interrupted, config)))
        if interrupted is not None and not resumes:
            print(f"refract retrain: run {interrupted.name} was interrupted and stays unfinished", file=sys.stderr)
        run_folder = interrupted if interrupted is not None and resumes else begin(config, force=force)
        ended = _run(run_folder)
        record = read_run(run_folder)
        if "outcome" not in record:
            again = shlex.join(["refract", "retrain", "--resume", argv[0]])
            print(f"refract retrain: run {run_folder.name} {ended.words}; resume it with `{again}`", file=sys.stderr)
            if not ended.stopped:
                notify(run_folder, run_config(run_folder), record, int(Outcome.FAILED), ended.why)
            return int(Outcome.FAILED)
    outcome = Outcome(record["outcome"])
    words = "unchanged" if record.get("unchanged") else outcome.name.lower().replace("_", " ")
    print(f"{words}: {record['why']}")
    output.result({"outcome": words, "why": record["why"], "run": run_folder, "exit_code": int(outcome)})
    names = (RUN_RECORD, "gate.json", "config.yaml", "drift", "relabelled.csv", "report")
    print(f"run: {run_folder}/ ({', '.join(name for name in names if (run_folder / name).exists())})")
    return int(outcome)


class _End(NamedTuple):
    """How the steps ended. why: the error of a failed step, empty without one."""

    stopped: bool
    why: str

    @property
    def words(self) -> str:
        return "was stopped" if self.stopped else "failed"


def _run(run_folder: Path) -> _End:
    """Run the remaining steps; print the error of one that fails."""
    from refract.pipeline.retraining.run import note_stop
    from refract.pipeline.retraining.steps import run_steps
    from refract.pipeline.stopping import ASKED_TO_STOP

    errors = []

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt  # also for SIGTERM: a step must not mistake a signal for a failure of what it calls

    def steps() -> int:
        try:
            run_steps(run_folder)
        except Exception as error:
            errors.append(masked(str(error)) or type(error).__name__)
            raise
        return 0

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, stop)
        stopped = console.run("retrain", steps) in (ASKED_TO_STOP, INTERRUPTED)
    except KeyboardInterrupt:
        stopped = True
    except Exception:
        log.exception("refract retrain: an error of Refract itself; please report it with these lines")
        stopped = False
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        note_stop(run_folder)
    return _End(stopped, next(iter(errors), ""))
