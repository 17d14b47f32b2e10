"""CIFAR-10 by `configs/cifar10-94.yaml`, compared with a plain PyTorch loop: the same network, initial weights, order, optimiser, schedule,
precision and average of the weights, and the same kinds of augmentation on images that are on the device.

The time of both is that of the training steps, the device synchronised at the end of each epoch. What surrounds them in `refract train`
(validation, checkpoints, the doctor) is in "Refract fit with validation and checkpoints"; checking the data and writing the report is not
measured. The record on an A100 (Jordan 2024, arXiv:2404.00498, and later) counts training alone, after a warm-up, and compiles the network.
"""

import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import data
from benchmarks.gpu.plan import Clock, Options
from benchmarks.gpu.record import Record
from benchmarks.gpu.timing import device_facts, wait

if TYPE_CHECKING:
    import torch

    from refract.models.classifier import Classifier
    from refract.pipeline.config.config import Config
    from refract.pipeline.training.fit import Assembly

CONFIG = Path(__file__).parents[2] / "configs" / "cifar10-94.yaml"
QUICK = (
    "--model.args", "{widths: [8, 8, 8]}", "--trainer.max_epochs", "2", "--data.batch_size", "16", "--trainer.tta", "flip",
)  # fmt: skip


def run(options: Options, record: Record, clock: Clock) -> None:
    """Measure the stage `cifar`."""
    import refract.cli

    refract.cli.prepare_to_compute()
    from refract.models.allocator import keep_freed_memory
    from refract.pipeline.config.config import load_config
    from refract.pipeline.training.callbacks.progress import quiet_lightning
    from refract.pipeline.training.fit import assemble

    device = options.device
    if options.cifar is None and not options.quick:
        record.skip_rest("--cifar TAR was not given")
        return
    keep_freed_memory()
    quiet_lightning()
    more = QUICK if options.quick else ()
    config = load_config(CONFIG, ["--trainer.device", device, "--tracking.enabled", "false", *more])
    record.fact(**device_facts(device), config=CONFIG.name, overrides=list(more))
    started = time.perf_counter()
    split: dict[str, Any] = {"val_fraction": config.data.val_fraction, "seed": config.trainer.seed}
    manifest = data.colours(**split) if options.quick or options.cifar is None else data.cifar(options.cifar, **split)
    assembly = assemble(config, (manifest, {"fingerprint": "benchmark", "content": "benchmark"}))
    record.measure("preparation", time.perf_counter() - started)
    counts = {split: len(manifest.of(split)) for split in manifest.splits()}
    record.fact(images=counts, epochs=config.trainer.max_epochs, precision=assembly.precision)
    _plain_side(assembly, config, record, device)
    _refract_side(assembly, config, record, options)
    seconds, plain = record.value("Refract training"), record.value("plain training")
    if seconds is not None and plain is not None:
        record.measure("Refract / plain training", seconds / plain)


def _plain_side(assembly: "Assembly", config: "Config", record: Record, device: str) -> None:
    """Train and measure a copy of the classifier; the initial one stays as it is."""
    warm = copy.deepcopy(assembly.module.classifier)
    train_plainly(warm, assembly, config, device, steps=5)
    classifier = copy.deepcopy(assembly.module.classifier)
    record.measure("plain training", train_plainly(classifier, assembly, config, device))
    record.measure("plain accuracy with TTA", _accuracy(classifier, assembly, config.trainer.tta))


def train_plainly(
    classifier: "Classifier", assembly: "Assembly", config: "Config", device: str, *, steps: int | None = None
) -> float:
    """Seconds of the loop that people write by hand. steps: end after so many. Leaves the averaged weights in the classifier."""
    import torch
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    from refract.models.training.objective import classification_loss

    module, order = assembly.module, assembly.data.order
    classifier.to(device).to(memory_format=torch.channels_last).train()
    optimizer = module.optim.make(classifier.network)
    size, epochs, decay = config.data.batch_size, config.trainer.max_epochs, config.trainer.ema
    total = epochs * -(-len(order) // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: module.optim.factor(step, total))
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(assembly.precision)
    dataset = assembly.data.train_set
    padded, targets = _resident(dataset.decoded, device), torch.from_numpy(dataset.targets).to(device)
    flips = torch.rand(len(order), device=device) < 0.5
    values = [value for value in classifier.state_dict().values() if value.is_floating_point()]
    average, count, started = [value.clone() for value in values], 0, 0.0
    wait(device)
    started = time.perf_counter()
    for epoch in range(epochs):
        order.set_epoch(epoch)
        places = torch.tensor([key[1] for key in order], device=device)
        for rows in places.split(size):
            with torch.autocast(device, mixed, enabled=mixed is not None):
                logits = classifier(_augmented(padded, rows, flips[rows] ^ bool(epoch % 2)))
                loss = classification_loss(
                    logits, targets[rows], task="multiclass", label_smoothing=module.loss.label_smoothing
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(average, values, count)
            count += 1
            if count == steps:
                wait(device)
                return time.perf_counter() - started
    for value, averaged in zip(values, average, strict=True):
        value.copy_(averaged)
    wait(device)
    order.set_epoch(0)
    return time.perf_counter() - started


PADDING = 2


def _resident(images: Any, device: str) -> "torch.Tensor":
    """All training images on the device, padded by reflection, uint8 N×3×(H + 4)×(W + 4)."""
    import numpy as np
    import torch

    pad = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
    return torch.from_numpy(np.pad(np.stack(images), pad, mode="reflect")).permute(0, 3, 1, 2).to(device)


def _augmented(padded: "torch.Tensor", rows: "torch.Tensor", flips: "torch.Tensor") -> "torch.Tensor":
    """Crop each image at its own position, and flip the images of `flips` (bool, B). Returns uint8 B×3×H×W."""
    import torch

    height, width = (side - 2 * PADDING for side in padded.shape[-2:])
    offsets = torch.randint(0, 2 * PADDING + 1, (2, len(rows), 1), device=padded.device)
    y = offsets[0] + torch.arange(height, device=padded.device)
    x = offsets[1] + torch.arange(width, device=padded.device)
    x = torch.where(flips[:, None], x.flip(1), x)
    crops = padded[rows[:, None, None], :, y[:, :, None], x[:, None, :]]  # (B, H, W, 3)
    return crops.permute(0, 3, 1, 2)


def _refract_side(assembly: "Assembly", config: "Config", record: Record, options: Options) -> None:
    """Train as `refract train` does, and measure."""
    from lightning.pytorch.callbacks import Callback

    from refract.pipeline.doctor.run import make_doctor
    from refract.pipeline.training.cost import Cost
    from refract.pipeline.training.fit import fit

    device, keys = options.device, []
    for epoch in range(config.trainer.max_epochs):
        assembly.data.order.set_epoch(epoch)
        keys += list(assembly.data.order)
    assembly.data.order.set_epoch(0)
    augmenter = assembly.data.train_set.augmenter
    started = time.perf_counter()
    for epoch, index, repeat in keys:
        augmenter.draw(config.data.sides(), epoch=epoch, index=index, repeat=repeat)
    record.measure("plans of all epochs", time.perf_counter() - started)

    class Meter(Callback):
        seconds = started = 0.0

        def on_train_epoch_start(self, *_: Any) -> None:
            self.started = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.is_last_batch:  # validation follows
                wait(device)
                self.seconds += time.perf_counter() - self.started

    meter, cost, doctor = Meter(), Cost(device), make_doctor(assembly)
    started = time.perf_counter()
    try:
        fit(assembly, options.work / "run", None, watchers=[meter, doctor, cost])
    finally:
        cost.close()
    record.measure("Refract fit with validation and checkpoints", time.perf_counter() - started)
    record.measure("Refract training", meter.seconds)
    classifier = assembly.module.classifier
    record.measure("Refract accuracy", _accuracy(classifier, assembly, "none"))
    record.measure("Refract accuracy with TTA", _accuracy(classifier, assembly, config.trainer.tta))


def _accuracy(classifier: "Classifier", assembly: "Assembly", tta: Any) -> float:
    """On the test set."""
    from refract.pipeline.evaluation.evaluate import evaluate

    manifest = assembly.manifest
    evaluation = evaluate(
        classifier.eval(), assembly.data.preprocess, manifest.of("test"), task=manifest.task, labels=manifest.labels,
        tta=tta,
    )  # fmt: skip
    return evaluation.metrics["accuracy"]
