"""Compare settings of trainings from random weights, on folders of images: what `init` proposes, changed by each setting.

Each training is a separate process, whose processor time is measured. Trainings of one seed share the splits, so that settings are compared
on the same test images.

    OMP_NUM_THREADS=1 python -m benchmarks.from_scratch --data DIR DIR --network resnet20 --json OUT.json
        --settings optim.lr=2e-3 optim.lr=5e-3 optim.lr=5e-3,loss.label_smoothing=0.1
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.first_config import run_command
from benchmarks.report import environment, write
from benchmarks.transfer import processor_seconds

FIXED = ["--tracking.enabled", "false", "--trainer.run_name", "run", "--evaluation.robustness", "none"]


def trained(data: Path, network: str, setting: str, seed: int) -> dict[str, Any]:
    """Run `init` and `train` with a setting: KEY=VALUE of the config, several joined by commas. Returns test metrics and seconds."""
    keys = [part for pair in setting.split(",") for part in (f"--{pair.partition('=')[0]}", pair.partition("=")[2])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = processor_seconds()
        start = ["--model.name", network, "--model.weights", "none"]
        run_command(["init", str(data.resolve()), *start, "-o", "first.yaml"], folder)
        run_command(["train", "first.yaml", "--trainer.seed", str(seed), *FIXED, *keys], folder)
        metrics = json.loads((folder / "runs" / "run" / "bundle" / "bundle.json").read_text("utf-8"))["metrics"]
    row = {
        "data": data.name, "network": network, "setting": setting, "seed": seed, "accuracy": round(metrics["accuracy"], 4),
        "nll": round(metrics["nll"], 4), "processor_seconds": round(processor_seconds() - before, 1),
    }  # fmt: skip
    print(" ".join(f"{value!s:<12}" for value in row.values()), flush=True)
    return row


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean over the seeds for each folder, network and setting."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["data"], run["network"], run["setting"]), []).append(run)
    return [
        {
            "data": data, "network": network, "setting": setting, "seeds": len(group),
            "accuracy": round(mean(run["accuracy"] for run in group), 4),
            "deviation": round(stdev(run["accuracy"] for run in group), 4) if len(group) > 1 else None,
            "nll": round(mean(run["nll"] for run in group), 4),
        }
        for (data, network, setting), group in groups.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--network", nargs="+", default=["resnet20"])
    parser.add_argument("--settings", nargs="+", default=["optim.lr=2e-3", "optim.lr=5e-3"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for data in args.data:
            for network in args.network:
                for setting in args.settings:
                    runs.append(trained(data, network, setting, seed))
                    if args.json is not None:  # after each training, because trainings take long
                        packages = environment("refract", "torch", "lightning")
                        write(args.json, {"rows": summarise(runs), "runs": runs, "environment": packages})
    for row in summarise(runs):
        print(" ".join(f"{value!s:<12}" for value in row.values()))


if __name__ == "__main__":
    main()
