"""Measure how the start of a training and an evaluation grow: processor time and memory against the numbers of samples and classes.

`samples`: `refract train` on a CSV of N images of 32×32 pixels, up to the first optimizer step of its training loop, first without and
then with the cache of image checks. `commands`: whole commands on the same images: one epoch with tracking, evaluation of all images,
their scores, and a retraining run with its snapshot, holdout and gate. Memory is the peak of the proportional set size (PSS) of the
process and its children: it is smaller while other processes share the same libraries.
`classes`: the evaluation of 2·C predictions for C classes, its report and its files. Exponents are slopes of the logarithms over the two
largest sizes: 1 is linear. With --json, sizes that are not measured keep their rows.

    OMP_NUM_THREADS=1 python -m benchmarks.growth --samples 1000 10000 100000 --classes 100 1000 --json benchmarks/results/growth.json
    OMP_NUM_THREADS=1 python -m benchmarks.growth --samples --classes --commands 1000 10000 100000 --json benchmarks/results/growth.json
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import environment, write

FIRST_STEP = str(Path(__file__).with_name("first_step.py"))

OPTIONS = ["--model.name", "lenet5", "--data.image_size", "32", "--data.memory", "never", "--tracking.enabled", "false"]

COMMANDS: dict[str, list[str]] = {
    "train": ["train", "config.yaml", "--trainer.run_name", "run"],
    "evaluate": ["evaluate", "runs/run/bundle", "images.csv", "--report", "report"],
    "score": ["score", "runs/run/bundle", "images.csv", "-o", "scores.parquet"],
    "retrain": ["retrain", "config.yaml", "--tracking.model_name", "growth"],
}
"""Name → arguments of `refract`, in the order in which they run."""
CONFIG = """
data: {source: images.csv, image_size: 32, memory: never}
model: {name: lenet5}
trainer: {max_epochs: 1, device: cpu}
evaluation: {robustness: none}
gate: {robustness_loss: null}
tracking: {uri: "sqlite:///mlflow.db"}
"""


def write_images(count: int, folder: Path) -> Path:
    """Write images of noise in folders of 1,000 files, and a CSV of their paths. Returns the CSV."""
    import cv2

    rng = np.random.default_rng(0)
    lines = ["path,label"]
    for index in range(count):
        file = folder / f"{index // 1000:04}" / f"{index:07}.jpg"
        if index % 1000 == 0:
            file.parent.mkdir(parents=True)
        pixels = cv2.resize(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC)
        file.write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())
        lines.append(f"{file},c{index % 10}")
    manifest = folder / "images.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def first_step(manifest: Path, home: Path) -> dict[str, float]:
    """Train up to the first step. Returns seconds, processor seconds, and the peak memory in MB."""
    config = home / "config.yaml"
    config.write_text(f"data: {{source: {manifest}}}\n")
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-P", FIRST_STEP, "train", str(config), *OPTIONS, "--trainer.runs_dir", str(home / "runs")],
            env={**os.environ, "REFRACT_CACHE_DIR": str(home / "cache")}, cwd=home,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        watch = _Watch(process.pid)
        assert process.stdout is not None
        reached = any(line.startswith("STEP") for line in iter(process.stdout.readline, ""))
        seconds = time.perf_counter() - started
        used = watch.stop()
        process.communicate("\n")
        if not reached:
            errors.seek(0)
            raise RuntimeError(f"the training ended before its first step:\n{errors.read()[-2000:]}")
    return {"seconds": round(seconds, 2), **used}


def commands(manifest: Path, home: Path) -> dict[str, dict[str, float]]:
    """Run COMMANDS. Returns seconds, processor seconds and the peak memory in MB of each."""
    (home / "config.yaml").write_text(CONFIG)
    (home / "images.csv").write_bytes(manifest.read_bytes())
    measurements = {}
    for name, arguments in COMMANDS.items():
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "refract", *arguments],
            env={**os.environ, "REFRACT_CACHE_DIR": str(home / "cache")}, cwd=home,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        watch = _Watch(process.pid)
        _, errors = process.communicate()
        seconds, used = time.perf_counter() - started, watch.stop()
        if process.returncode:
            raise RuntimeError(f"refract {name} ended with exit code {process.returncode}:\n{errors[-2000:]}")
        measurements[name] = {"seconds": round(seconds, 2), **used}
    return measurements


class _Watch:
    """Samples the memory and the processor time of a process and its children in a thread.

    Workers of a pool are children of a server process that nobody waits for, so that the kernel's sum over children lacks them.
    """

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._end = pid, 0.0, threading.Event()
        self._processor: dict[tuple[int, str], float] = {}  # (PID, start) → seconds so far
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """Return the processor seconds and the peak memory in MB."""
        self._end.set()
        self._thread.join()
        return {"processor_seconds": round(sum(self._processor.values()), 2), "peak_mb": round(self._peak)}

    def _run(self) -> None:
        while True:
            tree = process_tree(self._pid)
            self._peak = max(self._peak, sum(map(_pss_mb, tree)))
            for pid in tree:
                with suppress(OSError):  # has ended
                    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    ticks = int(values[11]) + int(values[12])
                    self._processor[pid, values[19]] = ticks / os.sysconf("SC_CLK_TCK")
            if self._end.wait(0.2):
                return


def process_tree(pid: int) -> list[int]:
    """Return the process and its children at any depth."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # has ended
                continue
            children.setdefault(parent, []).append(int(entry.name))
    tree = [pid]
    for process in tree:
        tree += children.get(process, [])
    return tree


def _pss_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def evaluation(classes: int) -> dict[str, float]:
    """Evaluate predictions in a separate process. Returns processor seconds, peak memory in MB, and bytes of the report's files."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.growth", "--evaluate", str(classes)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def _evaluate(classes: int) -> dict[str, float]:
    import cv2

    from refract.pipeline.data.manifest import Sample
    from refract.pipeline.evaluation import measures
    from refract.pipeline.evaluation.evaluate import measured
    from refract.pipeline.evaluation.report import make_report

    count, rng = 2 * classes, np.random.default_rng(0)
    truth = np.arange(count) % classes
    probabilities = np.empty((count, classes), np.float32)
    for row, label in zip(probabilities, truth, strict=True):
        row[:] = rng.normal(0, 1.5, classes)
        row[label] += rng.choice([3, 13])
        row[:] = np.exp(row - row.max())
        row /= row.sum()
    image = cv2.imencode(".png", rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))[1].tobytes()
    samples = [Sample(f"{index}.png", (int(label),), "test", data=image) for index, label in enumerate(truth)]
    labels = [f"class {index}" for index in range(classes)]
    started = time.process_time()
    temperature = measures.fit_temperature(probabilities, truth, multilabel=False)
    result = measured(probabilities, samples, task="multiclass", labels=labels)
    with tempfile.TemporaryDirectory() as folder:
        facts = {"temperature": temperature}
        report = make_report("Growth", result, labels, facts=facts, precision=0.95, abstain_below=0.5)
        sizes = {path.name: path.stat().st_size for path in report.write(Path(folder))}
    return {
        "processor_seconds": round(time.process_time() - started, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "probabilities_mb": round(probabilities.nbytes / 2**20),
        **{f"{name}_bytes": size for name, size in sizes.items()},
    }


def exponent(rows: Sequence[dict[str, Any]], size: str, value: str) -> float | None:
    """Return the slope of the logarithms between the last two rows."""
    if len(rows) < 2:
        return None
    one, other = rows[-2:]
    return round(math.log(other[value] / one[value]) / math.log(other[size] / one[size]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--classes", type=int, nargs="*", default=[100, 1_000])
    parser.add_argument("--commands", type=int, nargs="*", default=[])
    parser.add_argument("--evaluate", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.evaluate is not None:
        print(json.dumps(_evaluate(args.evaluate)))
        return
    measurements: dict[str, Any] = {"samples": [], "classes": [], "commands": []}
    if args.json is not None and args.json.exists():
        stored = json.loads(args.json.read_text())
        measurements |= {kind: stored[kind] for kind in measurements if kind in stored and not getattr(args, kind)}
    for count in args.samples:
        with tempfile.TemporaryDirectory() as folder:
            manifest = write_images(count, Path(folder) / "images")
            home = Path(folder) / "home"
            home.mkdir()
            time.sleep(2.5)  # younger files are not cached
            cold, warm = first_step(manifest, home), first_step(manifest, home)
        measurements["samples"].append(
            {"samples": count, **cold, **{f"again_{name}": value for name, value in warm.items()}}
        )
        print(measurements["samples"][-1], flush=True)
    for count in args.classes:
        measurements["classes"].append({"classes": count, **evaluation(count)})
        print(measurements["classes"][-1], flush=True)
    for count in args.commands:
        with tempfile.TemporaryDirectory() as folder:
            manifest = write_images(count, Path(folder) / "images")
            home = Path(folder) / "home"
            home.mkdir()
            measurements["commands"].append({"samples": count, **commands(manifest, home)})
        print(measurements["commands"][-1], flush=True)
    measurements["exponents"] = {
        f"{kind}, {value}": exponent(measurements[kind], kind, value)
        for kind, values in (
            ("samples", ("processor_seconds", "again_processor_seconds")),
            ("classes", ("processor_seconds",)),
        )
        for value in values
    }
    for name in COMMANDS:
        rows = [{"samples": row["samples"], **row[name]} for row in measurements["commands"]]
        measurements["exponents"][f"{name}, processor_seconds"] = exponent(rows, "samples", "processor_seconds")
    print(measurements["exponents"])
    if args.json is not None:
        write(args.json, {**measurements, "environment": environment("refract", "torch", "lightning", "pandas")})


if __name__ == "__main__":
    main()
