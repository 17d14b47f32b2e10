"""Refract on one GPU, in minutes: correctness, augmentation, input, training and serving, each number next to its goal.

    python -m benchmarks.gpu --seconds 420 --cifar cifar10.tar --json benchmarks/results/gpu/h100.json
    python -m benchmarks.gpu --device cpu --quick --json /tmp/gpu.json

Each stage runs in its own process with its own time limit. A stage that fails or hangs does not stop the others. The JSON file is written
after each stage. Exit code 1 where a stage failed or a test failed; a missed goal is printed and does not change the exit code.
"""

import argparse
import faulthandler
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import STAGES, Clock, Options
from benchmarks.gpu.processes import run_limited
from benchmarks.gpu.record import Record, read_record
from benchmarks.gpu.table import lines

QUICK_S, FULL_S = 230.0, 420.0
MARGIN_S = 4.0
"""Seconds of its limit that a stage does not plan with."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help=f"for all stages together ({FULL_S:g}; {QUICK_S:g} with --quick)")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="tiny networks and images: tests the program, measures nothing"
    )
    parser.add_argument("--cifar", type=Path, metavar="TAR", help="CIFAR-10 as train|test/CLASS/*.jpg")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=[*STAGES], metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cifar is not None and not args.cifar.is_file():
        parser.error(f"--cifar {args.cifar}: no such file; give a tar of train|test/CLASS/*.jpg")
    seconds = args.seconds or (QUICK_S if args.quick else FULL_S)
    if args.stage:
        return _run_here(args, seconds)
    if args.device == "cuda" and not _has_gpu():
        parser.error("--device cuda: PyTorch sees no GPU; `--device cpu --quick` tests the program without one")
    return _run_all(args, seconds)


def _run_here(args: argparse.Namespace, seconds: float) -> int:
    """Run one stage in this process. A stage that hangs prints where each of its threads is before it is stopped."""
    faulthandler.dump_traceback_later(seconds + MARGIN_S / 2)
    clock, record = Clock(seconds), Record(args.json, args.stage)
    with tempfile.TemporaryDirectory(prefix="refract-gpu-") as work:
        options = Options(args.device, args.cifar and args.cifar.resolve(), args.quick, Path(work))
        module = importlib.import_module(f"benchmarks.gpu.{STAGES[args.stage].module}")
        module.run(options, record, clock)
    return 0


def _run_all(args: argparse.Namespace, seconds: float) -> int:
    clock, judged = Clock(seconds), args.device == "cuda" and not args.quick
    report: dict[str, Any] = {"device": args.device, "quick": args.quick, "seconds": seconds, "stages": {}}
    failed = False
    with tempfile.TemporaryDirectory(prefix="refract-gpu-") as folder:
        for place, name in enumerate(args.stages):
            left = [STAGES[later] for later in args.stages[place:]]
            weights = [stage.quick_weight if args.quick else stage.weight for stage in left]
            limit = clock.left * weights[0] / sum(weights)
            record = _stage(name, args, Path(folder), limit)
            report["stages"][name] = record
            failed |= record["code"] != 0 or record["values"].get("tests failed", 0) > 0
            print(f"{name}: {record['ending']}", flush=True)
            if record["code"] != 0:
                print(record["tail"], flush=True)
            _write(args.json, report)
    from benchmarks.report import environment

    report["environment"] = environment("refract", "torch", "torchvision", "lightning", "timm", "kornia", "onnxruntime")
    _write(args.json, report)
    print(f"\nwrote {args.json}")
    if not judged:
        print("Without a GPU, or with --quick, the numbers test the program; they are not compared with the goals.")
    for line in lines(report["stages"], judged=judged):
        print(line)
    return 1 if failed else 0


def _stage(name: str, args: argparse.Namespace, folder: Path, limit: float) -> dict[str, Any]:
    """Run a stage in a process and return its record, with its `code`, `ending` and the `tail` of its log."""
    out = folder / f"{name}.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name, "--json", str(out), "--device", args.device]
    command += ["--seconds", f"{max(1.0, limit - MARGIN_S):.1f}"]
    command += [] if args.cifar is None else ["--cifar", str(args.cifar)]
    command += ["--quick"] if args.quick else []
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "HOME": str(folder)}
    done = run_limited(command, log=folder / f"{name}.log", limit=limit, env=env)
    if done.code is None:
        ending = f"stopped at its limit of {limit:.0f} s"
    else:
        ending = (
            f"ended after {done.seconds:.0f} s"
            if done.code == 0
            else f"failed after {done.seconds:.0f} s (exit code {done.code})"
        )
    tail = "" if done.code == 0 else done.tail
    return {**read_record(out), "code": done.code, "ending": ending, "limit": round(limit, 1), "tail": tail}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
