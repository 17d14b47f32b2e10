"""An epoch of `configs/cifar10.yaml` through Refract beside a plain PyTorch loop.

Both have the same network, pictures in memory, order, augmentation, precision, optimiser and schedule. Rounds alternate;
the epoch's seconds are compared, validation apart.

    python -m benchmarks.train_epoch --data CIFAR_FOLDER --json benchmarks/results/train_epoch.json
"""

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from augment import planes
from benchmarks.report import environment, summary, write
from models.losses import classification_loss
from pipeline.config import load_config
from pipeline.fitting import Assembly, assemble

CONFIG = Path(__file__).parents[1] / "configs" / "cifar10.yaml"


def plain(made: Assembly) -> float:
    """Seconds of one epoch of the loop that people write by hand."""
    module, data, pictures = made.module, made.data, made.data.train_set
    classifier = module.classifier.train()
    optimizer = module.optim.make(classifier.network)
    steps = -(-len(pictures) // data.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: module.optim.factor(step, steps))
    started = time.perf_counter()
    order, total, right = [key[1] for key in data.order], torch.zeros(()), torch.zeros(())
    for first in range(0, len(order), data.batch_size):
        rows = order[first : first + data.batch_size]
        drawn = [planes(pictures.augmenter(pictures.decoded[i], epoch=0, index=i)) for i in rows]
        images = torch.from_numpy(np.stack(drawn)).contiguous(memory_format=torch.channels_last)
        targets = torch.from_numpy(pictures.targets[rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=made.precision.startswith("bf16")):
            logits = classifier(images)
            loss = classification_loss(logits, targets, task="multiclass", label_smoothing=module.loss.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach() * len(rows)
        right += (logits.detach().argmax(1) == targets).sum()
    if not torch.isfinite(total):
        raise FloatingPointError("the loss is not finite")
    return time.perf_counter() - started


class Clock(Callback):
    """The seconds between an epoch's start and end."""

    def on_train_epoch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.elapsed = time.perf_counter() - self.started


def through_refract(made: Assembly) -> float:
    clock = Clock()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, precision=made.precision, callbacks=[clock], limit_val_batches=0, logger=False,  # type: ignore[arg-type]
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(made.module, datamodule=made.data)
    return clock.elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as train|test/CLASS/*.jpg")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    config = load_config(CONFIG, ["--data.source", str(args.data), "--trainer.device", "cpu"])
    made = assemble(config)
    start = {key: value.clone() for key, value in made.module.state_dict().items()}
    times: dict[str, list[float]] = {"plain": [], "refract": []}
    for number in range(args.rounds):
        for kind in ("plain", "refract") if number % 2 else ("refract", "plain"):
            made.module.load_state_dict(start)
            times[kind].append(plain(made) if kind == "plain" else through_refract(made))
            print(f"{kind}: {times[kind][-1]:.1f} s")
    ratio = sum(times["refract"]) / sum(times["plain"])
    print(
        f"Refract takes {100 * (ratio - 1):+.1f} % of the plain loop's time for an epoch of {len(made.data.train_set):,} pictures"
    )
    report = {"seconds_per_epoch": {kind: summary(own) for kind, own in times.items()}, "ratio": round(ratio, 4)}
    write(
        args.json, {**report, "precision": made.precision, "environment": environment("refract", "torch", "lightning")}
    )


if __name__ == "__main__":
    main()
