"""Measure what the start of each command costs: seconds, CPU seconds (user and system, all its processes) and peak memory.

"torch" imports PyTorch and builds an optimizer, which every training does; it is the lower limit of a training process.
"train, first step" ends `refract train` at the first optimizer step of its training loop. In it, MLflow creates the tables of its database;
in "train again, first step" they exist. "train" and "retrain" train lenet5 on the digits for one epoch.
"serve" ends with the response to its first prediction; the second time, the choice of the backend is in the cache.

    python -m benchmarks.startup --rounds 3 --json benchmarks/results/startup.json
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import cv2
import numpy as np

from benchmarks.report import environment, write

CONFIG = """
data: {source: digits, image_size: 32, resize: squash, batch_size: 64, workers: 0}
augment: {policy: digits}
model: {name: lenet5}
trainer: {max_epochs: 1, device: cpu}
evaluation: {robustness: none}
tracking: {uri: "sqlite:///mlflow.db"}
"""
FIRST_STEP = str(Path(__file__).with_name("first_step.py"))
TORCH = "import torch; torch.optim.AdamW([torch.zeros(1)])"
BUNDLE = "runs/first/bundle"
IMAGE = cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].tobytes()
SERVE = ("-m", "refract", "serve", BUNDLE, "--port", "0")
PYTHON: dict[str, tuple[str, ...]] = {
    "torch": ("-c", TORCH),
    "import lightning": ("-c", f"{TORCH}; import lightning.pytorch"),
    "train, first step": ("-P", FIRST_STEP, "train", "config.yaml"),
    "train": ("-m", "refract", "train", "config.yaml", "--trainer.run_name", "first"),
    "train again, first step": ("-P", FIRST_STEP, "train", "config.yaml"),
    "evaluate": ("-m", "refract", "evaluate", BUNDLE, "digits"),
    "compare": ("-m", "refract", "compare", "runs/first", "runs/first"),
    "serve": SERVE,
    "serve again": SERVE,
    "retrain": ("-m", "refract", "retrain", "config.yaml", "--tracking.model_name", "digits"),
}
"""The measured programs, in the order in which they run: the later ones read the files of `train`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in PYTHON}
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.yaml").write_text(CONFIG)
            for name, arguments in PYTHON.items():
                taken[name].append(_measure(arguments, Path(folder), serves=arguments == SERVE))
                seconds, cpu, memory = taken[name][-1]
                print(f"round {number + 1}, {name}: {seconds:.2f} s, {cpu:.2f} s of CPU, {memory:.0f} MB", flush=True)
    result = {
        "seconds": {name: round(median(seconds for seconds, _, _ in runs), 2) for name, runs in taken.items()},
        "cpu_seconds": {name: round(median(cpu for _, cpu, _ in runs), 2) for name, runs in taken.items()},
        "peak_mb": {name: round(max(memory for _, _, memory in runs)) for name, runs in taken.items()},
        "rounds": args.rounds,
    }
    print(result)
    if args.json:
        write(args.json, {"environment": environment("torch", "lightning", "torchmetrics", "mlflow"), **result})
    return 0


def _measure(arguments: Sequence[str], folder: Path, *, serves: bool) -> tuple[float, float, float]:
    """Run Python with the arguments. Returns seconds, CPU seconds and the peak memory in MB. serves: stop it after its first response."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "REFRACT_CACHE_DIR": str(folder / "cache")}
    started = time.perf_counter()
    with (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            text=True,
        )  # fmt: skip
        assert process.stdout is not None
        if serves:
            _predict(process.stdout.readline())
        else:
            process.stdout.read()
        seconds = time.perf_counter() - started
        if serves:
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{arguments} ended with exit code {process.returncode}:\n{errors.read()}")
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def _predict(line: str) -> None:
    """Send an image to the server whose first line this is."""
    url = next(iter(line.split()[-1:]), "http://127.0.0.1:9")  # a server that did not start; its errors are reported
    request = urllib.request.Request(f"{url}/v1/predict", IMAGE, {"Content-Type": "image/png"})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200


if __name__ == "__main__":
    sys.exit(main())
