"""Compare an epoch of `configs/cifar10.yaml` in Refract with a plain PyTorch loop, each with its usual settings.

Both have the same network, images in memory, order, augmentation, precision, optimiser and schedule, and end with the same weights.
Each round starts a separate process for each side, in alternating order: the plain loop with Python's default settings, Refract with
those of its commands. The training of one epoch is measured, without validation and preparation. Goal: at most 0.82 of the plain time.

    python -m benchmarks.train_epoch --data CIFAR_FOLDER --json benchmarks/results/train_epoch.json

Further options override the config, as for `refract train`: `--model.name lenet5 --data.batch_size 64` makes a short trial.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refract.pipeline.training.fit import Assembly

CONFIG = Path(__file__).parents[1] / "configs" / "cifar10.yaml"
GOAL = 0.82
SIDES = ("plain", "refract")
MEASURED = ("seconds", "user_seconds", "system_seconds", "page_faults", "peak_megabytes")


def plain(assembly: "Assembly") -> dict[str, float]:
    """Measure one epoch of the plain loop."""
    import numpy as np
    import torch

    from refract.augment import planes
    from refract.models.training.objective import classification_loss

    module, data, dataset = assembly.module, assembly.data, assembly.data.train_set
    classifier = module.classifier.train()
    optimizer = module.optim.make(classifier.network)
    steps = -(-len(dataset) // data.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: module.optim.factor(step, steps))
    measured = meter()
    order, total, right = [key[1] for key in data.order], torch.zeros(()), torch.zeros(())
    for first in range(0, len(order), data.batch_size):
        rows = order[first : first + data.batch_size]
        assert dataset.decoded is not None  # the images stay in memory
        drawn = [planes(dataset.augmenter(dataset.decoded[i], epoch=0, index=i)) for i in rows]
        images = torch.from_numpy(np.stack(drawn)).contiguous(memory_format=torch.channels_last)
        targets = torch.from_numpy(dataset.targets[rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=assembly.precision.startswith("bf16")):
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
    return measured()


def through_refract(assembly: "Assembly") -> dict[str, float]:
    """Measure one epoch of the module and the batches of `refract train`."""
    import lightning
    from lightning.pytorch.callbacks import Callback

    measurements: list[dict[str, float]] = []

    class Meter(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.measured = meter()

        def on_train_epoch_end(self, *_: Any) -> None:
            measurements.append(self.measured())

    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, precision=assembly.precision, callbacks=[Meter()], limit_val_batches=0, logger=False,  # type: ignore[arg-type]
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(assembly.module, datamodule=assembly.data)
    return measurements[0]


def meter() -> Callable[[], dict[str, float]]:
    """Start measuring this process. The function that it returns gives MEASURED since then; the peak is that of the whole process."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)

    def measured() -> dict[str, float]:
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        return {
            "seconds": seconds,
            "user_seconds": after.ru_utime - before.ru_utime,
            "system_seconds": after.ru_stime - before.ru_stime,
            "page_faults": after.ru_minflt - before.ru_minflt,
            "peak_megabytes": after.ru_maxrss / 1024,
        }

    return measured


def one_side(side: str, data: Path, overrides: list[str]) -> dict[str, Any]:
    """Train one epoch in this process, which has not imported PyTorch yet."""
    if side == "refract":
        import refract.cli

        refract.cli.prepare_to_compute()
    from refract.pipeline.config.config import load_config
    from refract.pipeline.training.callbacks.progress import quiet_lightning
    from refract.pipeline.training.fit import assemble

    quiet_lightning()
    warnings.filterwarnings("ignore")
    options = ["--data.source", str(data), "--trainer.device", "cpu", *overrides]
    assembly = assemble(load_config(CONFIG, options))
    measured = (plain if side == "plain" else through_refract)(assembly)
    weights = hashlib.sha256()
    for tensor in assembly.module.classifier.network.state_dict().values():
        weights.update(tensor.contiguous().numpy().tobytes())
    about = {"weights": weights.hexdigest(), "images": len(assembly.data.train_set), "precision": assembly.precision}
    return {**measured, **about}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as train|test/CLASS/*.jpg")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process, and print its JSON")
    args, overrides = parser.parse_known_args()
    if args.side:
        print(json.dumps(one_side(args.side, args.data, overrides)))
        return
    if args.json is None:
        parser.error("--json FILE is missing")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for side in SIDES if number % 2 else reversed(SIDES):
            run = _in_a_process(side, args.data, overrides)
            runs[side].append(run)
            print(f"{side}: " + ", ".join(f"{name} {run[name]:,.1f}" for name in MEASURED), flush=True)
    _report(runs, args.json, overrides)


def _in_a_process(side: str, data: Path, overrides: list[str]) -> dict[str, Any]:
    """Measure one side in a new process.

    Settings of Refract's commands must not affect the plain loop, and settings of the shell must not affect one side alone.
    """
    command = [sys.executable, "-m", "benchmarks.train_epoch", "--data", str(data), "--side", side, *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _report(runs: dict[str, list[dict[str, Any]]], file: Path, overrides: list[str]) -> None:
    from benchmarks.report import environment, summary, write
    from refract.models.allocator import configured_by_user

    weights = {run["weights"] for side in SIDES for run in runs[side]}
    if len(weights) > 1:
        print("the weights differ: the sides did not do the same work, or PyTorch is not reproducible here")
    times = {side: [run["seconds"] for run in runs[side]] for side in SIDES}
    ratio = sum(times["refract"]) / sum(times["plain"])
    first = runs["plain"][0]
    print(f"Refract takes {ratio:.3f} of the plain loop's time (goal: {GOAL}); an epoch of {first['images']:,} images")
    if configured_by_user(os.environ):
        print("malloc is configured by the environment, for both sides: the ratio is not that of the defaults")
    report = {
        "seconds_per_epoch": {side: summary(times[side]) for side in SIDES},
        "ratio": round(ratio, 4),
        "goal": GOAL,
        "same_weights": len(weights) == 1,
        "rounds": {side: [{name: round(run[name], 2) for name in MEASURED} for run in runs[side]] for side in SIDES},
        "images": first["images"],
        "precision": first["precision"],
        "overrides": overrides,
        "malloc_configured_by_user": configured_by_user(os.environ),
        "environment": environment("refract", "torch", "lightning"),
    }
    write(file, report)


if __name__ == "__main__":
    main()
