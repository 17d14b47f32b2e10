"""Compare the Lightning step of `refract train` with a plain PyTorch loop: same network, batches, optimiser, schedule and precision.

python -m benchmarks.train_overhead --json benchmarks/results/train_overhead.json
"""

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from benchmarks.gpu.timing import wait
from benchmarks.plain_loop import seconds_a_step
from benchmarks.report import environment, summary, write
from refract.models.classifier import Classifier
from refract.models.registry import build
from refract.models.training.lightning_module import ClassifierModule
from refract.pipeline.config.sections import TrainerConfig
from refract.pipeline.training.device import choose_device, choose_precision

CLASSES, SIDE, WARM_UP = 10, 32, 10


def fresh(name: str) -> Classifier:
    torch.manual_seed(0)
    return Classifier(build(name, CLASSES, image_size=(SIDE, SIDE)), mean=(0.5,) * 3, std=(0.25,) * 3)


def plain(name: str, batches: DataLoader, device: str, precision: str) -> float:
    """Return the milliseconds per step of the plain loop."""
    classifier = fresh(name).to(device).to(memory_format=torch.channels_last)
    mixed = precision.startswith("bf16")
    return 1000 * seconds_a_step(classifier, batches, len(batches), device, warm_up=WARM_UP, mixed=mixed)


class Clock(Callback):
    """Times the same steps inside Lightning."""

    def __init__(self, device: str, last: int) -> None:
        self.device, self.last, self.started, self.elapsed = device, last, 0.0, 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx in (WARM_UP - 1, self.last):
            wait(self.device)
            self.elapsed = time.perf_counter() - self.started
            self.started = time.perf_counter()


def with_lightning(name: str, batches: DataLoader, device: str, precision: Any) -> float:
    """Return the milliseconds per step of `ClassifierModule` in a Trainer."""
    clock = Clock(device, len(batches) - 1)
    module = ClassifierModule(fresh(name), task="multiclass", num_classes=CLASSES, channels_last=True)
    trainer = lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_epochs=1, precision=precision, callbacks=[clock],
        logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=batches)
    return 1000 * clock.elapsed / (len(batches) - WARM_UP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "lenet5"])
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    device = choose_device("auto")
    precision = choose_precision(TrainerConfig(), device)
    torch.manual_seed(1)
    random_batches = [
        {
            "images": torch.randint(0, 256, (args.batch_size, 3, SIDE, SIDE), dtype=torch.uint8),
            "targets": torch.randint(0, CLASSES, (args.batch_size,)),
            "indices": torch.arange(args.batch_size),
        }
        for _ in range(WARM_UP + args.steps)
    ]
    batches: DataLoader = DataLoader(random_batches, batch_size=None)  # type: ignore[arg-type]
    rows = {}
    for name in args.networks:
        times: dict[str, list[float]] = {"plain": [], "lightning": []}
        for number in range(args.rounds):
            # The order alternates, so that a machine whose speed changes favours neither side.
            for kind in ("plain", "lightning") if number % 2 else ("lightning", "plain"):
                run = plain if kind == "plain" else with_lightning
                times[kind].append(run(name, batches, device, precision))
        rows[name] = {kind: summary(values) for kind, values in times.items()}
        ratio = rows[name]["lightning"]["median"] / rows[name]["plain"]["median"]
        rows[name]["overhead"] = {"ratio": round(ratio, 4)}
        print(f"{name}: plain {rows[name]['plain']['median']:.2f} ms, Lightning {rows[name]['lightning']['median']:.2f} ms a step, "
              f"{100 * (ratio - 1):+.1f} %")  # fmt: skip
    report = {
        "batch_size": args.batch_size, "steps": args.steps, "device": device, "precision": precision, "milliseconds_per_step": rows,
        "environment": environment("refract", "torch", "lightning"),
    }  # fmt: skip
    write(args.json, report)


if __name__ == "__main__":
    main()
