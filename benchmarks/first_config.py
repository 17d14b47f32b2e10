"""`refract init` and `refract train` without edits, compared with the script of a careful engineer, on three kinds of folders.

The kinds: photos with ImageNet's weights of EfficientNet-Lite0, small colour images without weights, and large grey images without weights.
Both sides have the same training, validation and test images, network, input size, batch size and number of epochs, which are those that
`init` proposes; each side chooses everything else. Each training is a separate process, whose processor time is measured. The JSON file
keeps the kinds that are not measured again.

    python -m benchmarks.first_config --photos DIR --small DIR --grey DIR --json benchmarks/results/first_config.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from benchmarks.finetuners.task import Task
from benchmarks.pretrained import NAME, lite0_weights
from benchmarks.report import environment, write
from benchmarks.transfer import processor_seconds

KINDS = ("photos", "small", "grey")

FROM_SCRATCH = {"small": "resnet20", "grey": "resnet18"}
"""The networks of the kinds without weights. `init` would propose the weights of the extra `pretrained`, where it is installed."""


def through_refract(data: Path, seed: int, folder: Path, start: list[str]) -> tuple[dict[str, Any], float, Path]:
    """Run `init` and `train`. Returns (the config that `init` wrote, accuracy on the test set, the run's folder)."""
    run_command(["init", str(data), *start, "-o", "first.yaml"], folder)
    config = yaml.safe_load((folder / "first.yaml").read_text("utf-8"))
    run_command(
        [
            "train",
            "first.yaml",
            "--trainer.seed",
            str(seed),
            "--tracking.enabled",
            "false",
            "--trainer.run_name",
            "run",
        ],
        folder,
    )
    record = json.loads((folder / "runs" / "run" / "bundle" / "bundle.json").read_text("utf-8"))
    return config, record["metrics"]["accuracy"], folder / "runs" / "run"


def run_command(arguments: list[str], folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "refract", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"refract {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")


def expert_task(kind: str, config: dict[str, Any], run: Path, seed: int, weights: Path) -> Task:
    """Return the expert's task on the images of Refract's run, from the splits that the run wrote."""
    mode = "linear-then-fine-tune" if kind == "photos" else kind
    return Task(
        manifest=str(run / "splits.csv"),
        weights=str(weights) if kind == "photos" else "",
        network=config["model"]["name"].removeprefix("timm/"),
        mode=mode,
        seed=seed,
        epochs=config["trainer"]["max_epochs"],
        size=config["data"]["image_size"],
        batch_size=config["data"]["batch_size"],
    )


def through_expert(kind: str, task: Task) -> float:
    """Return the expert's accuracy on the test set."""
    module = "plain_timm" if kind == "photos" else "from_scratch"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"benchmarks.finetuners.{module}", task.to_json()],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the expert's {kind} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["accuracy"])


def measured(kind: str, data: Path, seed: int) -> dict[str, Any]:
    """Return the accuracies and the processor seconds of both sides."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = lite0_weights(folder / "lite0.safetensors")
        network, start_weights = (NAME, str(weights)) if kind == "photos" else (FROM_SCRATCH[kind], "none")
        start = ["--model.name", network, "--model.weights", start_weights]
        before = processor_seconds()
        config, accuracy, run = through_refract(data.resolve(), seed, folder, start)
        between = processor_seconds()
        expert = through_expert(kind, expert_task(kind, config, run, seed, weights))
        after = processor_seconds()
    row = {
        "seed": seed, "commit": environment()["commit"], "epochs": config["trainer"]["max_epochs"], "network": config["model"]["name"],
        "refract": round(accuracy, 4), "expert": round(expert, 4),
        "refract_processor_seconds": round(between - before, 1), "expert_processor_seconds": round(after - between, 1),
    }  # fmt: skip
    print(f"{kind:8} {row}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=Path, help="folder of images, by class")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows_by_kind: dict[str, Any] = {}
    earlier = json.loads(args.json.read_text("utf-8"))["kinds"] if args.json and args.json.is_file() else {}
    for seed in range(args.seeds):
        for kind in KINDS:
            if (data := getattr(args, kind)) is not None:
                rows_by_kind.setdefault(kind, []).append(measured(kind, data, seed))
                if args.json:  # after each training, because trainings take long
                    write(
                        args.json,
                        {"kinds": earlier | rows_by_kind, "environment": environment("refract", "torch", "timm")},
                    )
    for kind, rows in rows_by_kind.items():
        print(f"{kind:8} refract {mean(r['refract'] for r in rows):.3f}  expert {mean(r['expert'] for r in rows):.3f}")


if __name__ == "__main__":
    main()
