"""Count the threads that want a core while Refract's commands run: those in state R, of all processes of a command.

`train` and its loader workers, `evaluate`, `score` and `retrain` work on images of 256×256 pixels with resnet18. A sample is taken every
20 ms. --quota N repeats all in a control group with a quota of N cores, which needs root: without Refract's limit, PyTorch would start a
thread for each core of the machine.

    python -m benchmarks.threads --json benchmarks/results/threads.json
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.growth import process_tree
from benchmarks.report import environment, write
from refract.cores import cores

CONFIG = """
data: {source: images, image_size: 128, memory: never}
model: {name: resnet18}
trainer: {max_epochs: 2, device: cpu}
evaluation: {robustness: none}
gate: {robustness_loss: null}
tracking: {uri: "sqlite:///mlflow.db"}
"""
COMMANDS = {
    "train": ["train", "config.yaml", "--trainer.run_name", "run"],
    "train, no workers": ["train", "config.yaml", "--data.workers", "0"],
    "evaluate": ["evaluate", "runs/run/bundle", "images"],
    "score": ["score", "runs/run/bundle", "images", "-o", "scores.parquet"],
    "retrain": ["retrain", "config.yaml", "--tracking.model_name", "threads"],
}
"""Name → arguments of `refract`, in the order in which they run."""
EVERY_S = 0.02


def write_images(folder: Path, count: int) -> None:
    import cv2

    rng = np.random.default_rng(0)
    for index in range(count):
        file = folder / f"class {index % 4}" / f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = cv2.resize(
            rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), (256, 256), interpolation=cv2.INTER_CUBIC
        )
        file.write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())


def measure(arguments: list[str], folder: Path, group: Path | None) -> dict[str, float]:
    """Run a command. Returns its seconds, and the numbers of threads that ran or waited for a core: mean, 95th percentile and most."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "refract", *arguments], cwd=folder,
            env={**os.environ, "REFRACT_CACHE_DIR": str(folder / "cache")}, stdout=subprocess.DEVNULL, stderr=errors,
            preexec_fn=None if group is None else lambda: (group / "cgroup.procs").write_text("0") and None,
        )  # fmt: skip
        counts = []
        while process.poll() is None:
            counts.append(sum(map(_runnable, process_tree(process.pid))))
            time.sleep(EVERY_S)
        seconds = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(
                f"refract {arguments[0]} ended with exit code {process.returncode}:\n{errors.read()[-2000:]}"
            )
    return {
        "seconds": round(seconds, 1), "mean": round(float(np.mean(counts)), 2), "p95": float(np.quantile(counts, 0.95)), "most": max(counts)
    }  # fmt: skip


def _runnable(pid: int) -> int:
    count = 0
    for file in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            count += file.read_text().rpartition(")")[2].split()[0] == "R"
        except OSError:  # the thread has ended
            continue
    return count


@contextmanager
def quota_group(count: int) -> Iterator[Path]:
    """Make a control group with a quota of `count` cores, of cgroup v1 or v2."""
    v1 = Path("/sys/fs/cgroup/cpu")
    group = (v1 if v1.is_dir() else v1.parent) / f"refract-threads-{os.getpid()}"
    group.mkdir()
    try:
        if v1.is_dir():
            (group / "cpu.cfs_period_us").write_text("100000")
            (group / "cpu.cfs_quota_us").write_text(str(count * 100000))
        else:
            (group / "cpu.max").write_text(f"{count * 100000} 100000")
        yield group
    finally:
        while (group / "cgroup.procs").read_text():  # a process of a pool ends a moment later
            time.sleep(0.1)
        group.rmdir()


def measured(group: Path | None, images: int) -> dict[str, Any]:
    measurements = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", images)
        (folder / "config.yaml").write_text(CONFIG)
        for command, arguments in COMMANDS.items():
            measurements[command] = measure(arguments, folder, group)
            print(command, measurements[command], flush=True)
    return measurements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--quota", type=int, metavar="CORES")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = {"cores": cores(), "commands": measured(None, args.images)}
    if args.quota is not None:
        with quota_group(args.quota) as group:
            report["quota"] = {"cores": args.quota, "commands": measured(group, args.images)}
    if args.json is not None:
        write(args.json, {**report, "environment": environment("refract", "torch", "opencv-python-headless")})


if __name__ == "__main__":
    main()
