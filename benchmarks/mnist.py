"""Measure the error of LeNet-5 with and without augmentation on MNIST's 10,000 test digits: 9,000 for training, 1,000 drawn for testing.

Each run is `configs/mnist.yaml` through the same function as `refract train`. IMAGES and LABELS are the original files of 10,000 digits.

    python -m benchmarks.mnist --images t10k-images-idx3-ubyte.gz --labels t10k-labels-idx1-ubyte.gz --json benchmarks/results/mnist.json
"""

import argparse
import gzip
import logging
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import cv2
import numpy as np
import pandas as pd

from benchmarks.report import environment, write
from refract.pipeline.config.config import load_config
from refract.pipeline.training.run import train

CONFIG = Path(__file__).parents[1] / "configs" / "mnist.yaml"


def write_manifest(images: Path, labels: Path, folder: Path) -> Path:
    """Write the digits as PNG files below `folder`, with their manifest."""
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    numbers = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
    rows = []
    for i, (image, number) in enumerate(zip(pixels, numbers, strict=True)):
        path = folder / f"{i:05}.png"
        cv2.imwrite(str(path), image)
        rows.append({"path": str(path), "label": int(number)})
    manifest = folder / "mnist.csv"
    pd.DataFrame(rows).to_csv(manifest, index=False)
    return manifest


def run(manifest: Path, seed: int, policy: str | None, runs: Path) -> dict[str, float]:
    # 2 % of the 9,000 training digits are the validation set, which chooses the epoch.
    options = ["--data.source", str(manifest), "--data.test_fraction", "0.1", "--data.val_fraction", "0.02"]
    options += ["--trainer.seed", str(seed), "--trainer.runs_dir", str(runs), "--tracking.enabled", "false"]
    config = load_config(CONFIG, options + ([] if policy is None else ["--augment.policy", policy]))
    started = time.perf_counter()
    result = train(config, name="mnist")
    assert result is not None  # as on each further rank
    return {
        "seed": seed,
        "error": round(1 - result.metrics["accuracy"], 5),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    report: dict[str, Any] = {"environment": environment("refract", "torch", "lightning"), "config": CONFIG.name}
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_manifest(args.images, args.labels, Path(folder))
        for label, policy in (("with augmentation", None), ("without", "none")):
            rows = [run(manifest, seed, policy, Path(folder) / label) for seed in range(args.seeds)]
            errors = [row["error"] for row in rows]
            report[label] = {"mean_error": round(mean(errors), 5), "deviation": round(stdev(errors), 5), "runs": rows}
            print(
                f"{label:<18} error {mean(errors):.2%} ± {stdev(errors):.2%}, at most {max(r['seconds'] for r in rows):.0f} s a run"
            )
    write(args.json, report)


if __name__ == "__main__":
    main()
