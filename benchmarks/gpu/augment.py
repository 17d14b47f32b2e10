"""The batch executor compared with the copy bandwidth, kornia and torchvision v2: a batch of 224² images, each with its own draw.

Refract and torchvision take and give uint8, kornia float32 in 0…1: each its own form. GB/s count the uint8 batch once read and once
written, which is what a run must move at least.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.gpu.plan import Clock, Options
from benchmarks.gpu.record import Record
from benchmarks.gpu.timing import device_facts, timed

if TYPE_CHECKING:
    import torch


def run(options: Options, record: Record, clock: Clock) -> None:
    """Measure the stage `augment`."""
    import torch

    from benchmarks.augment_batch import POLICY, SIDE, kornia, random_images, refract

    device, count = options.device, 4 if options.quick else 256
    record.fact(**device_facts(device), batch=count, side=SIDE, policy=[next(iter(op)) for op in POLICY])
    images = random_images(count).to(device)
    moved = 2 * images.nbytes / 1e9

    def measure(call: Callable[[], object], name: str, fraction: float) -> float:
        seconds = timed(call, device, seconds=fraction * clock.left, rounds=2 if options.quick else 50)
        record.measure(name, count / seconds)
        return seconds

    ours = measure(refract(images), "Refract", 0.25)
    record.measure("Refract bandwidth", moved / ours)
    record.measure("plans of one batch", 1000 * _plans(count, options))
    buffer = torch.zeros((8 if options.quick else 1024) << 20, dtype=torch.uint8, device=device)
    copy = 2 * buffer.nbytes / 1e9 / timed(buffer.clone, device, seconds=2, rounds=10)
    record.measure("copy bandwidth", copy)
    record.measure("Refract / copy bandwidth", moved / ours / copy)
    del buffer
    theirs = measure(torchvision_v2(images), "torchvision v2", 0.4)
    record.measure("Refract / torchvision v2", theirs / ours)
    try:
        call = kornia(images)
    except ImportError as err:
        record.skip_rest(f"kornia cannot be imported: {err}")
        return
    record.measure("Refract / kornia", measure(call, "kornia", 0.6) / ours)


def torchvision_v2(images: "torch.Tensor") -> Callable[[], "torch.Tensor"]:
    """The ops of `augment_batch` by torchvision, image by image, as it draws once for a batch."""
    import torch
    from torchvision.transforms import v2

    from benchmarks.augment_batch import SIDE

    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomResizedCrop(SIDE, scale=(0.5, 1.0)),
            v2.RandomAffine(15.0, (0.1, 0.1), (0.9, 1.1), 5.0, interpolation=v2.InterpolationMode.BILINEAR),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
            v2.RandomErasing(p=1.0),
        ]
    )
    return lambda: torch.stack([transform(image) for image in images])


def _plans(count: int, options: Options) -> float:
    """Seconds in which the processor draws the plans of a batch: the part of a run that no GPU makes faster."""
    from benchmarks.augment_batch import POLICY, SIDE
    from refract.augment import Augmenter

    augmenter = Augmenter(POLICY, seed=0)
    return timed(
        lambda: [augmenter.draw((SIDE, SIDE), epoch=0, index=index) for index in range(count)],
        "cpu",
        seconds=1,
        rounds=2 if options.quick else 10,
    )
