"""`refract retrain CONFIG [--section.key value …]`"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from refract import output
from refract.models.credentials import masked
from refract.pipeline.cli import console

FLOW = Path(__file__).parents[1] / "retraining" / "flow.py"

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
    from refract.pipeline.retraining.steps import Outcome, begin, note_failure, unfinished, worth_resuming
    from refract.pipeline.retraining.workspace import RUN_RECORD, read_run, workspace_of
    from refract.pipeline.tracking.address import check_address, tracking_uri

    config = load_config(argv[0], argv[1:])
    workspace = workspace_of(config)
    check_address(tracking_uri(config.tracking))
    with workspace.held():
        interrupted = unfinished(workspace)
        if resume and interrupted is None:
            raise ConfigError(f"--resume: {workspace.root} has no interrupted run; start one without --resume")
        resumes = interrupted is not None and (resume or (resume_or_begin and worth_resuming(interrupted, config)))
        if interrupted is not None and not resumes:
            print(f"refract retrain: run {interrupted.name} was interrupted and stays unfinished", file=sys.stderr)
        run_folder = interrupted if interrupted is not None and resumes else begin(config, force=force)
        code, stopped = _flow(run_folder, workspace.root, tracking_uri(config.tracking), resume=resumes)
        record: dict[str, Any] = read_run(run_folder)
        if "outcome" not in record:
            if not stopped:
                note_failure(run_folder)
            again = f"refract retrain --resume {argv[0]}"
            print(f"refract retrain: run {run_folder.name} failed ({code}); resume it with `{again}`", file=sys.stderr)
            return int(Outcome.FAILED)
    outcome = Outcome(record["outcome"])
    words = "unchanged" if record.get("unchanged") else outcome.name.lower().replace("_", " ")
    print(f"{words}: {record['why']}")
    output.result({"outcome": words, "why": record["why"], "run": run_folder, "exit_code": int(outcome)})
    names = (RUN_RECORD, "gate.json", "config.yaml", "drift", "relabelled.csv")
    print(f"run: {run_folder}/ ({', '.join(name for name in names if (run_folder / name).exists())})")
    return int(outcome)


def _flow(run_folder: Path, root: Path, uri: str, *, resume: bool) -> tuple[int, bool]:
    """Run the flow's remaining steps. uri: the tracking server's, with the credentials that the run's stored config lacks.

    Returns (Metaflow's exit code, whether a signal stopped the flow).
    """
    from refract.pipeline.retraining.workspace import METAFLOW_RUN

    environment = {
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(root.resolve()),
        "METAFLOW_DEFAULT_METADATA": "local",
        "METAFLOW_DEFAULT_DATASTORE": "local",
        "METAFLOW_USER": "refract",
        "REFRACT_PARENT_PID": str(os.getpid()),
        "PYTHONSAFEPATH": "1",  # Python must not import from the flow's folder
    }
    if masked(uri) != uri:
        environment["MLFLOW_TRACKING_URI"] = uri
    id_file = run_folder / METAFLOW_RUN
    origin = id_file.read_text().strip() if resume and id_file.exists() else None
    action = ["resume", "--origin-run-id", origin] if origin else ["run", "--run", str(run_folder)]
    quiet = ["--quiet"] if output.is_quiet() else []
    command = [sys.executable, str(FLOW), "--no-pylint", *quiet, *action, "--run-id-file", str(id_file)]
    child = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)

    signals: list[int] = []

    def forward(number: int, _: Any) -> None:
        signals.append(number)
        os.killpg(child.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return child.wait(), bool(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
