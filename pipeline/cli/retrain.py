"""`refract retrain CONFIG [--section.key value …]`"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from refract.models.credentials import masked
from refract.pipeline.cli import console

FLOW = Path(__file__).parents[1] / "retraining" / "flow.py"

USAGE = """usage: refract retrain CONFIG.yaml [--section.key value …] [--force]
       refract retrain CONFIG.yaml --resume

The nightly run: write the data down, check them against the last night's, train, measure, register as `challenger`, compare with
the champion on the frozen hold-out, promote if it is better. tracking.model_name names the registered model. A night that was cut
short goes on with --resume: steps that ended are kept, training goes on from its checkpoint. --resume-or-begin, for where nobody
looks, begins one where none was cut, where the config is another one by now, or where the night failed three times. Where data,
config and code are those of the last night it ends at once; --force trains all the same.

Exit codes: 0 promoted, or nothing had changed; 10 trained, but not promoted; 20 data refused; 30 failed, --resume goes on;
2 the config cannot be used, or another night of the model is under way."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    flags = {flag: flag in argv for flag in ("--resume", "--resume-or-begin", "--force")}
    rest = [argument for argument in argv if argument not in flags]
    if not rest or rest[0].startswith("--"):
        print("refract retrain: the config file comes first, then options", file=sys.stderr)
        return 2
    if flags["--resume"] and (len(rest) > 1 or flags["--force"]):
        print(
            "refract retrain: --resume goes on with the night's own config; give the config file alone", file=sys.stderr
        )
        return 2
    own = {name[2:].replace("-", "_"): given for name, given in flags.items()}
    return console.run("retrain", lambda: _retrain(rest, **own))


def _retrain(argv: list[str], *, resume: bool, resume_or_begin: bool, force: bool) -> int:
    from refract.pipeline.config.config import ConfigError, load_config
    from refract.pipeline.retraining.steps import Outcome, begin, note_failure, unfinished, worth_resuming
    from refract.pipeline.retraining.workspace import read, workspace_of
    from refract.pipeline.tracking.address import check_address, tracking_uri

    config = load_config(argv[0], argv[1:])
    place = workspace_of(config)
    check_address(tracking_uri(config.tracking))
    with place.held():
        left = unfinished(place)
        if resume and left is None:
            raise ConfigError(f"--resume: no night of {place.root} was cut short")
        goes_on = left is not None and (resume or (resume_or_begin and worth_resuming(left, config)))
        if left is not None and not goes_on:
            print(f"refract retrain: the night {left.name} was cut short and is left so", file=sys.stderr)
        night = left if left is not None and goes_on else begin(config, force=force)
        code, stopped = _flow(night, place.root, tracking_uri(config.tracking), resume=goes_on)
        record: dict[str, Any] = read(night / "night.json")
        if "outcome" not in record:
            if not stopped:
                note_failure(night)
            again = f"refract retrain --resume {argv[0]}"
            print(f"refract retrain: the night {night.name} failed ({code}); `{again}` goes on", file=sys.stderr)
            return int(Outcome.FAILED)
    outcome = Outcome(record["outcome"])
    words = "unchanged" if record.get("unchanged") else outcome.name.lower().replace("_", " ")
    print(f"{words}: {record['why']}")
    there = [
        name
        for name in ("night.json", "gate.json", "config.yaml", "drift", "relabelled.csv")
        if (night / name).exists()
    ]
    print(f"night:   {night}/ ({', '.join(there)})")
    return int(outcome)


def _flow(night: Path, root: Path, uri: str, *, resume: bool) -> tuple[int, bool]:
    """Run the steps, those that are left. uri: of the tracking server, whose credentials the night's own config lacks.

    Returns (the exit code of Metaflow, whether a signal asked for the end)."""
    environment = {
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(root.resolve()),
        "METAFLOW_DEFAULT_METADATA": "local",
        "METAFLOW_DEFAULT_DATASTORE": "local",
        "METAFLOW_USER": "refract",
        "REFRACT_PARENT_PID": str(os.getpid()),
        "PYTHONSAFEPATH": "1",  # the flow's folder is no place to import from
    }
    if masked(uri) != uri:
        environment["MLFLOW_TRACKING_URI"] = uri
    ids = night / "metaflow-run"
    begun = ids.read_text().strip() if resume and ids.exists() else None
    own = ["resume", "--origin-run-id", begun] if begun else ["run", "--night", str(night)]
    command = [sys.executable, str(FLOW), "--no-pylint", *own, "--run-id-file", str(ids)]
    child = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)

    asked: list[int] = []

    def passed_on(number: int, _: Any) -> None:
        asked.append(number)
        os.killpg(child.pid, number)

    before = {number: signal.signal(number, passed_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return child.wait(), bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
