"""The Lightning step of `refract train` beside a plain PyTorch loop: same network, batches, optimiser, schedule and precision.

python -m benchmarks.train_overhead --json benchmarks/results/train_overhead.json
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from benchmarks.report import environment, summary, write
from models.classifier import Classifier
from models.losses import classification_loss
from models.module import ClassifierModule
from models.networks import build
from models.optim import OptimSpec
from pipeline.device import choose_device, choose_precision
from pipeline.sections import TrainerConfig

CLASSES, SIDE, WARM_UP = 10, 32, 10


def fresh(name: str) -> Classifier:
    torch.manual_seed(0)
    return Classifier(build(name, CLASSES, image_size=(SIDE, SIDE)), mean=(0.5,) * 3, std=(0.25,) * 3)


def plain(name: str, batches: DataLoader, device: str, precision: str) -> float:
    """Milliseconds a step of the loop that people write by hand."""
    classifier = fresh(name).to(device, memory_format=torch.channels_last).train()
    spec = OptimSpec()
    optimizer = spec.make(classifier.network)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: spec.factor(step, len(batches)))
    mixed = precision.startswith("bf16")
    started, losses, right = 0.0, torch.zeros((), device=device), torch.zeros((), device=device)
    for step, batch in enumerate(batches):
        if step == WARM_UP:
            _wait(device)
            started = time.perf_counter()
        images = batch["images"].to(device, memory_format=torch.channels_last)
        targets = batch["targets"].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            logits = classifier(images)
            loss = classification_loss(logits, targets, task="multiclass")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses += loss.detach()
        right += (logits.detach().argmax(1) == targets).sum()
    if not torch.isfinite(losses):
        raise FloatingPointError("the loss is not finite")
    _wait(device)
    return 1000 * (time.perf_counter() - started) / (len(batches) - WARM_UP)


class Clock(Callback):
    """Times the same steps inside Lightning."""

    def __init__(self, device: str, last: int) -> None:
        self.device, self.last, self.started, self.elapsed = device, last, 0.0, 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if batch_idx in (WARM_UP - 1, self.last):
            _wait(self.device)
            self.elapsed = time.perf_counter() - self.started
            self.started = time.perf_counter()


def with_lightning(name: str, batches: DataLoader, device: str, precision: str) -> float:
    """Milliseconds a step of `ClassifierModule` in a Trainer."""
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
    made = [
        {
            "images": torch.randint(0, 256, (args.batch_size, 3, SIDE, SIDE), dtype=torch.uint8),
            "targets": torch.randint(0, CLASSES, (args.batch_size,)),
            "indices": torch.arange(args.batch_size),
        }
        for _ in range(WARM_UP + args.steps)
    ]
    batches: DataLoader = DataLoader(made, batch_size=None)  # type: ignore[arg-type]
    rows = {}
    for name in args.networks:
        times: dict[str, list[float]] = {"plain": [], "lightning": []}
        for number in range(args.rounds):
            # The order alternates, so that a machine that warms or slows favours neither.
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


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
