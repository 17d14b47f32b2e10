"""Measure how much a tracking server that accepts connections and never responds slows a training, from its first epoch to its last.

Trains the digits in turn without tracking, with MLflow on SQLite, and with the silent server. Then it delivers the journal of the last
training and counts the metrics.

    python -m benchmarks.stalled_tracking --rounds 3 --json benchmarks/results/stalled_tracking.json
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from benchmarks.report import environment, write

CONFIG = """
data: {source: digits, image_size: 16, batch_size: 32, workers: 0}
model: {name: resnet20}
trainer: {max_epochs: %d, precision: fp32, device: cpu}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        work, taken = Path(folder), list[object]()
        (work / "config.yaml").write_text(CONFIG % args.epochs)
        threading.Thread(target=lambda: taken.extend(iter(server.accept, None)), daemon=True).start()
        silent = f"http://127.0.0.1:{server.getsockname()[1]}"
        ways = {
            "without tracking": ["--tracking.enabled", "false"],
            "sqlite": ["--tracking.uri", "sqlite:///mlflow.db"],
            "silent server": ["--tracking.uri", silent],
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(args.rounds):
            for way, options in ways.items():
                name = f"{way.replace(' ', '-')}-{number}"
                seconds[way].append(_train(work, *options, "--trainer.run_name", name))
                print(f"round {number + 1}, {way}: {seconds[way][-1]:.2f} s", flush=True)
        delivered_epochs, wanted = _synced(work, "silent-server-0"), args.epochs
    base = median(seconds["without tracking"])
    result = {
        "epochs": args.epochs - 1,
        "seconds": {way: [round(value, 2) for value in times] for way, times in seconds.items()},
        "cost": {way: round(median(times) / base - 1, 4) for way, times in seconds.items()},
        "epochs_delivered_later": delivered_epochs,
        "holds": median(seconds["silent server"]) < 1.01 * base and delivered_epochs == wanted,
    }
    print(result)
    if args.json:
        write(args.json, {"environment": environment("mlflow", "lightning", "torch"), **result})
    return 0 if result["holds"] else 1


def _train(work: Path, *options: str) -> float:
    """Train, and return the seconds from the end of the first epoch to the end of the last one."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "refract", "train", "config.yaml", *options]
    times = []
    with subprocess.Popen(
        command, cwd=work, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr or ():
            if line.startswith("epoch "):
                times.append(time.perf_counter())
    assert process.returncode == 0
    return times[-1] - times[0]


def _synced(work: Path, run: str) -> int:
    """Deliver the run's journal to a database, and return the number of epochs whose loss it then has."""
    database = f"sqlite:///{work}/later.db"
    command = [sys.executable, "-m", "refract", "sync", f"runs/{run}", "--uri", database]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    printed = subprocess.run(command, cwd=work, env=environ, capture_output=True, text=True, check=True).stdout
    match = re.search(r"run (\w+)", printed.rpartition("later.db")[2])
    assert match, printed
    from mlflow import MlflowClient

    return len(MlflowClient(database).get_metric_history(match[1], "train_loss"))


if __name__ == "__main__":
    sys.exit(main())
