"""Kill a training at random moments and resume it, many times: the final weights must equal those of an undisturbed training.

Trains the embedded digits once undisturbed and once with SIGKILL after random times, each followed by `refract train --resume`. Checks
that the final weights are equal bit for bit, that MLflow has one run with every metric once, and that no checkpoint is damaged. Exit code
1 if a check fails.

    python -m benchmarks.crash --kills 20 --json benchmarks/results/crash.json
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.report import environment, write

CONFIG = """
data: {source: digits, image_size: 16, batch_size: 16, workers: 0}
augment: {policy: [{Affine: {degrees: 10, translate: 0.1}}, {CutMix: {p: 0.5}}]}
model: {name: cnn, args: {widths: [16, 32], dropout: 0.2, residual: true, depth: 2, drop_path: 0.1}}
optim: {name: sgd, lr: 0.05}
trainer: {max_epochs: %d, precision: fp32, device: cpu, ema: 0.99, checkpoint_seconds: 0.2}
tracking: {model_name: crash}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "config.yaml").write_text(CONFIG % args.epochs)
        seconds = _train(work, "config.yaml", "--trainer.run_name", "calm")
        assert seconds is not None
        kills: list[dict[str, Any]] = []
        # The times between kills spread them over the whole training. Some processes die before their first new checkpoint.
        span = 2 * seconds / (args.kills + 1)
        alive = _train(work, "config.yaml", "--trainer.run_name", "killed", kill=draw.uniform(0, span))
        while alive is None:
            damaged = [path.name for path in (work / "runs/killed/checkpoints").glob("*.ckpt") if not _whole(path)]
            kills.append({"at": _place(work), "damaged": damaged})
            print(f"kill {len(kills)}: {kills[-1]}", flush=True)
            kill = draw.uniform(0, span) if len(kills) < args.kills else None
            alive = _train(work, "--resume", "runs/killed", kill=kill)
        result = {
            "kills": len(kills),
            "seconds_undisturbed": round(seconds, 1),
            "weights_equal": _weights(work, "calm") == _weights(work, "killed"),
            "damaged_checkpoints": sum(len(kill["damaged"]) for kill in kills),
            **_tracked(work),
        }
        result["holds"] = bool(
            result["weights_equal"] and not result["damaged_checkpoints"] and result["runs"] == 2
            and result["metrics_logged_twice"] == 0 and result["metrics_equal"] and result["kills"] >= args.kills
        )  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.json:
        write(
            args.json,
            {
                "environment": environment("torch", "lightning", "mlflow"),
                **result,
                "killed_at": [kill["at"] for kill in kills],
            },
        )
    return 0 if result["holds"] else 1


def _train(work: Path, *arguments: str, kill: float | None = None) -> float | None:
    """Run `refract train`, and return the seconds from the start of the training to the end of the process.

    Returns None if the process was killed, `kill` seconds after the start of the training.
    """
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "refract", "train", *arguments]
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=work, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        began = threading.Event()

        def listen() -> None:
            for line in process.stderr or ():
                lines.append(line)
                if line.startswith(("run ", "resuming from")):
                    began.set()
            began.set()

        threading.Thread(target=listen, daemon=True).start()
        began.wait()
        start = time.perf_counter()
        try:
            process.wait(timeout=kill)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None
    if process.returncode:
        sys.exit(f"refract train ended with {process.returncode}:\n{''.join(lines)}")
    return time.perf_counter() - start


def _place(work: Path) -> str:
    """Return the newest checkpoint and the number of metrics in the journal, which locate the kill."""
    names = sorted(path.stem for path in (work / "runs/killed/checkpoints").glob("resume-*.ckpt"))
    journal = work / "runs/killed/journal.jsonl"
    entries = len(journal.read_bytes().splitlines()) if journal.exists() else 0
    return f"{names[-1] if names else 'before the first checkpoint'}, {entries} entries"


def _whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _weights(work: Path, name: str) -> bytes:
    return (work / "runs" / name / "bundle" / "weights.safetensors").read_bytes()


def _tracked(work: Path) -> dict[str, Any]:
    """Return the metrics that MLflow has of the two runs."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{work}/mlflow.db")
    experiment = client.get_experiment_by_name("refract")
    assert experiment is not None
    mlflow_runs = client.search_runs([experiment.experiment_id])
    runs = {run.info.run_name: run for run in mlflow_runs}
    history: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, run in runs.items():
        points_by_metric = history.setdefault(name, {})
        for metric in run.data.metrics:
            points_by_metric[metric] = [
                (point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)
            ]
    twice = sum(len(points) - len({step for step, _ in points}) for points in history["killed"].values())
    compared = [name for name in history["calm"] if name != "epoch_seconds" and not name.startswith("cost_")]
    alike = all(history["calm"][name] == history["killed"].get(name) for name in compared)
    return {
        "runs": len(mlflow_runs),
        "metrics": sum(map(len, history["killed"].values())),
        "metrics_logged_twice": twice,
        "metrics_equal": alike,
        "statuses": sorted(run.info.status for run in runs.values()),
    }


if __name__ == "__main__":
    sys.exit(main())
