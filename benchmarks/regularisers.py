"""Measure the gain of Cutout, Random Erasing, MixUp and CutMix for a small residual network, added to flips and shifts, at one budget.

Trains `resnet20` on a part of a data set of small images (CIFAR-10 as TRAIN|test/CLASS/*.jpg) through the same function as
`refract train`, with several seeds. Every policy sees the same images in the same order. The test set is the whole `test` folder.

    python -m benchmarks.regularisers --data CIFAR --images 10000 --epochs 20 --seeds 3 --json benchmarks/results/regularisers.json
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd

from benchmarks.report import environment, write
from refract.pipeline.config.config import config_from_dict
from refract.pipeline.training.run import train

BASE: list[Any] = ["HorizontalFlip", {"PadAndCrop": {"padding": 4}}]
POLICIES: dict[str, list[Any]] = {
    "flips and shifts": BASE,
    "Cutout": [*BASE, {"Cutout": {"length": 16}}],  # DeVries & Taylor 2017, for CIFAR-10
    "RandomErasing": [*BASE, {"RandomErasing": {"p": 0.5}}],  # Zhong et al. 2020
    "MixUp": [*BASE, {"MixUp": {"alpha": 1.0}}],  # Zhang et al. 2018, for CIFAR-10
    "CutMix": [*BASE, {"CutMix": {"alpha": 1.0, "p": 0.5}}],  # Yun et al. 2019, for CIFAR
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--images", type=int, default=10_000, help="number of training images, with equally many of each class"
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        manifest = _manifest(args.data, args.images, Path(folder))
        runs: dict[str, list[float]] = {name: [] for name in POLICIES}
        for seed in range(args.seeds):
            for name, policy in POLICIES.items():
                began = time.perf_counter()
                runs[name].append(_error(manifest, policy, seed, args.epochs, Path(folder)))
                print(
                    f"seed {seed}  {name:<18} error {runs[name][-1]:.4f}  {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
    base = runs["flips and shifts"]
    table = {
        name: {
            "errors": errors,
            "mean": round(mean(errors), 4),
            "deviation": round(stdev(errors), 4) if len(errors) > 1 else None,
            "against_base": round(mean(a - b for a, b in zip(errors, base, strict=True)), 4),
        }
        for name, errors in runs.items()
    }
    for name, row in table.items():
        print(f"{name:<18} {row['mean']:.4f} ± {row['deviation']}  {row['against_base']:+.4f}")
    budget = {"images": args.images, "epochs": args.epochs, "seeds": args.seeds, "network": "resnet20"}
    write(args.json, {"environment": environment("torch", "lightning"), "budget": budget, "policies": table})


def _manifest(data: Path, images: int, folder: Path) -> Path:
    rows = []
    for split in ("train", "test"):
        for label in sorted(path for path in (data / split).iterdir() if path.is_dir()):
            files = sorted(label.iterdir())
            chosen = files[: images // 10] if split == "train" else files
            rows += [{"path": str(file.resolve()), "label": label.name, "split": split} for file in chosen]
    path = folder / "part.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def _error(manifest: Path, policy: list[Any], seed: int, epochs: int, folder: Path) -> float:
    result = train(
        config_from_dict(
            {
                "data": {
                    "source": str(manifest), "image_size": 32, "resize": "squash", "normalize": "data", "batch_size": 128,
                    "val_fraction": 0.02, "memory": "always",
                },
                "augment": {"policy": policy},
                "model": {"name": "resnet20"},
                "optim": {"name": "sgd", "lr": 0.1, "weight_decay": 5e-4, "schedule": "cosine"},
                "evaluation": {"robustness": "none"},
                "trainer": {"max_epochs": epochs, "seed": seed, "runs_dir": str(folder / "runs")},
                "tracking": {"enabled": False},
            }
        ),
        name="part",
    )  # fmt: skip
    assert result is not None
    return round(1 - result.metrics["accuracy"], 4)


if __name__ == "__main__":
    main()
