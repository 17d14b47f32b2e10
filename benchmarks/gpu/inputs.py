"""JPEG bytes to a normalised batch on the device, by worker processes and by batch decoding, and how long a step waits for it.

Workers: `refract train`'s own loader, with simplejpeg. Batch decoding: nvJPEG through torchvision on a GPU, in the thread that trains, then
the batch executor. A waiting fraction is the part of a training loop's time in which the loop asks for the next batch.
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

POLICY: list[dict[str, dict[str, Any]] | str] = [
    {"RandomResizedCrop": {"size": 224, "scale": [0.35, 1.0]}},
    "HorizontalFlip",
]
HEIGHT, WIDTH = 375, 500

Batches = Iterator["torch.Tensor"]


def run(options: Options, record: Record, clock: Clock) -> None:
    """Measure the stage `input`."""
    import os

    device, quick = options.device, options.quick
    count, side, size = (8, 64, 4) if quick else (512, 224, 128)
    workers = 1 if quick else min(16, os.cpu_count() or 1)
    record.fact(**device_facts(device), images=[HEIGHT, WIDTH], batch=size, workers=workers)
    files = write_jpegs(options.work / "jpegs", jpegs(count, height=HEIGHT, width=WIDTH))
    classifier, step = trainer_of(device, side, quick=quick)
    images = _blank(size, side, device)
    record.measure("ResNet-50 step", 1000 * timed(lambda: step(images), device, seconds=0.1 * clock.left, rounds=20))
    decoders = {
        "batch JPEG decoding with the batch executor": ("waiting fraction, batch decoding", _decoded),
        "workers with simplejpeg": ("waiting fraction, workers", _loaded),
    }
    for place, (name, (waiting, batches_of)) in enumerate(decoders.items()):
        share = clock.left / (len(decoders) - place)
        try:
            batches = batches_of(files, size, side, device, workers)
            warm_up = 1 if quick else 4
            for _ in range(warm_up):
                next(batches)
            rate = _rate(batches, classifier, size, device, seconds=0.4 * share, most=3 if quick else 200)
            record.measure(name, rate)
            record.measure(waiting, _waiting(batches, step, device, seconds=0.3 * share, most=3 if quick else 200))
        except (ImportError, RuntimeError) as err:
            record.skip(name, f"{type(err).__name__}: {str(err).splitlines()[0]}")
            record.skip(waiting, "its input path failed")


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


def _loaded(files: list[Path], size: int, side: int, device: str, workers: int) -> Batches:
    """Batches by `refract train`'s loader, epoch after epoch."""
    import torch

    from refract.augment import Augmenter, Preprocess
    from refract.pipeline.data.datamodule import ImageDataModule
    from refract.pipeline.data.manifest import Manifest, Sample

    repeats = 1 + 16 * size // len(files)
    samples = tuple(Sample(str(file), (number % 2,), "train") for number, file in enumerate(files * repeats))
    manifest = Manifest("generated", samples, ("a", "b"), "binary")
    augmenter = Augmenter(POLICY, seed=0, size=(side, side))
    data = ImageDataModule(
        manifest, augmenter=augmenter, preprocess=Preprocess(side, side), batch_size=size, workers=workers
    )
    loader = data.train_dataloader()
    while True:
        for batch in loader:
            if len(batch["images"]) == size:
                images = batch["images"].to(device, non_blocking=True)
                yield images.contiguous(memory_format=torch.channels_last)


def _decoded(files: list[Path], size: int, side: int, device: str, workers: int) -> Batches:
    """Batches by torchvision's batch decoding on the device, and the batch executor."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    from refract.augment import Augmenter
    from refract.augment.executors import torch_batch

    encoded = [torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in files]
    augmenter, place = Augmenter(POLICY, seed=0, size=(side, side)), 0
    while True:
        indices = [(place + number) % len(encoded) for number in range(size)]
        images = torch.stack(decode_jpeg([encoded[i] for i in indices], ImageReadMode.RGB, device=device))
        epoch, place = place // len(encoded), place + size
        plans = [augmenter.draw((HEIGHT, WIDTH), epoch=epoch, index=index) for index in indices]
        yield torch_batch.run(plans, images).contiguous(memory_format=torch.channels_last)


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
