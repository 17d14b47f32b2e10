"""JPEG bytes to a normalised batch on the device, by both input paths of `refract train`, and how long a step waits for them.

Workers: loader processes decode with simplejpeg and augment. Batch decoding: they read the files, and the device decodes by nvJPEG, in the
thread that trains, and augments by the batch executor. A waiting fraction is the part of a plain training loop's time in which the loop
asks for the next batch. The training's images/s are those of Lightning's loop, by which `data.decode_on: auto` chooses.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.data import jpegs, write_jpegs
from benchmarks.gpu.plan import Clock, Options
from benchmarks.gpu.record import Record
from benchmarks.gpu.timing import device_facts, timed, wait

if TYPE_CHECKING:
    import torch

    from refract.models.classifier import Classifier
    from refract.pipeline.data.datamodule import ImageDataModule
    from refract.pipeline.training.fit import Assembly

POLICY: list[dict[str, dict[str, Any]] | str] = [
    {"RandomResizedCrop": {"size": 224, "scale": [0.35, 1.0]}},
    "HorizontalFlip",
]
HEIGHT, WIDTH = 375, 500
PATHS = ("device", "workers")
"""Values of data.decode_on."""

Batches = Iterator["torch.Tensor"]


def run(options: Options, record: Record, clock: Clock) -> None:
    """Measure the stage `input`."""
    import os

    device, quick = options.device, options.quick
    count, side, size = (8, 64, 4) if quick else (512, 224, 128)
    workers = 1 if quick else min(16, os.cpu_count() or 1)
    record.fact(**device_facts(device), images=[HEIGHT, WIDTH], batch=size, workers=workers)
    files = write_jpegs(options.work / "jpegs", jpegs(count, height=HEIGHT, width=WIDTH))
    assembly = _assembly(files, side, size, workers, options)
    classifier, step = trainer_of(device, side, quick=quick)
    images = _blank(size, side, device)
    record.measure("ResNet-50 step", 1000 * timed(lambda: step(images), device, seconds=0.1 * clock.left, rounds=20))
    for position, place in enumerate(PATHS):
        name, waiting = f"loading, decode_on: {place}", f"waiting fraction, decode_on: {place}"
        share = 0.5 * clock.left / (len(PATHS) - position)
        try:
            batches = _batches(assembly.data, place, device)
            for _ in range(1 if quick else 4):  # workers start, kernels are chosen
                next(batches)
            rate = _rate(batches, classifier, size, device, seconds=0.5 * share, most=3 if quick else 200)
            record.measure(name, rate)
            record.measure(waiting, _waiting(batches, step, device, seconds=0.4 * share, most=3 if quick else 200))
        except (ImportError, RuntimeError) as err:
            record.skip(name, f"{type(err).__name__}: {str(err).splitlines()[0]}")
            record.skip(waiting, "its input path failed")
    _compare(assembly, record, steps=2 if quick else 32)


def _compare(assembly: "Assembly", record: Record, *, steps: int) -> None:
    """Time the training with both paths, as `data.decode_on: auto` does."""
    from refract.pipeline.training.input_path import difference, faster, timed_paths

    record.measure("difference of the paths' images", difference(assembly.data, assembly.device))
    rates = timed_paths(assembly, steps=steps)
    for place, rate in rates.items():
        record.measure(f"training, decode_on: {place}", rate)
    record.fact(chosen=faster(rates))


def _assembly(files: list[Path], side: int, size: int, workers: int, options: Options) -> "Assembly":
    """Return a training of a ResNet-50 (quick: a small network) on the files."""
    from refract.pipeline.config.config import config_from_dict
    from refract.pipeline.data.manifest import Manifest, Sample
    from refract.pipeline.training.fit import assemble

    repeats = 1 + 16 * size // len(files)
    train = [Sample(str(file), (number % 2,), "train") for number, file in enumerate(files * repeats)]
    others = [Sample(str(file), (number % 2,), "val") for number, file in enumerate(files)]
    values = {
        "data": {"image_size": side, "batch_size": size, "workers": workers, "memory": "never"},
        "augment": {"policy": POLICY},
        "model": {"name": "cnn", "args": {"widths": [8]}} if options.quick else {"name": "resnet50"},
        "trainer": {"device": options.device, "runs_dir": str(options.work)},
        "tracking": {"enabled": False},
    }
    manifest = Manifest("generated", (*train, *others), ("a", "b"), "binary")
    identity = {"fingerprint": "benchmark", "content": "benchmark"}
    return assemble(config_from_dict(values), (manifest, identity))


def trainer_of(device: str, side: int, *, quick: bool) -> tuple["Classifier", Callable[["torch.Tensor"], object]]:
    """A ResNet-50 (quick: a small network) and the training step of a plain loop, bf16, channels_last, not compiled."""
    import torch

    from refract.models.classifier import Classifier
    from refract.models.registry import build

    network = build("cnn" if quick else "resnet50", 100, image_size=(side, side), args={"widths": [8]} if quick else {})
    classifier = Classifier(network, mean=(0.5,) * 3, std=(0.25,) * 3).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(classifier.network.parameters(), 0.01, momentum=0.9)

    def step(images: "torch.Tensor") -> None:
        targets = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(classifier(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return classifier.train(), step


def _blank(size: int, side: int, device: str) -> "torch.Tensor":
    import torch

    images = torch.zeros(size, 3, side, side, dtype=torch.uint8, device=device)
    return images.contiguous(memory_format=torch.channels_last)


def _batches(data: "ImageDataModule", place: str, device: str) -> Batches:
    """Batches by `refract train`'s loader, epoch after epoch. place: of decoding, a key of PATHS."""
    import torch

    data.decode_on(place)
    loader, target = data.train_dataloader(), torch.empty(0, device=device).device
    while True:
        for batch in loader:
            if len(batch["targets"]) == data.batch_size:
                images = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, target, 0), 0)["images"]
                yield images.contiguous(memory_format=torch.channels_last)


def _rate(batches: Batches, classifier: "Classifier", size: int, device: str, *, seconds: float, most: int) -> float:
    """Images a second, with the network's own normalisation."""
    wait(device)
    started, count = time.perf_counter(), 0
    while count == 0 or (count < most and time.perf_counter() - started < seconds):
        classifier.normalise(next(batches))
        count += 1
    wait(device)
    return count * size / (time.perf_counter() - started)


def _waiting(
    batches: Batches, step: Callable[["torch.Tensor"], object], device: str, *, seconds: float, most: int
) -> float:
    """The fraction of a training loop's time in which the loop waits for a batch."""
    started, waited, count = time.perf_counter(), 0.0, 0
    while count == 0 or (count < most and time.perf_counter() - started < seconds):
        asked = time.perf_counter()
        images = next(batches)
        wait(device)  # what the device decodes or copies is waited for, too
        waited += time.perf_counter() - asked
        step(images)
        wait(device)
        count += 1
    return waited / (time.perf_counter() - started)
