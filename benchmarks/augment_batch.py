"""Compare the batch executor with kornia on one CPU core: flip, crop, affine, colour and erase, each sample with its own draw.

The batch has 64 images of 224². Refract reads and returns uint8; kornia reads and returns float32 in 0…1. These are their own formats, so
no conversion is counted for either. The times include the drawing of the plans, as kornia draws inside its call too.

    python -m benchmarks.augment_batch --json benchmarks/results/augment_batch.json
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import environment, summary, write
from refract.augment import Augmenter
from refract.augment.executors import torch_batch

warnings.simplefilter("ignore")

SIDE = 224
POLICY: list[dict[str, dict[str, Any]]] = [
    {"HorizontalFlip": {"p": 0.5}},
    {"RandomResizedCrop": {"size": SIDE, "scale": [0.5, 1.0]}},
    {"Affine": {"degrees": 15, "translate": 0.1, "scale": [0.9, 1.1], "shear": 5}},
    {"ColorJitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}},
    {"RandomErasing": {"p": 1.0, "scale": [0.02, 0.33], "ratio": [0.3, 3.3], "value": 0}},
]


def random_images(count: int) -> torch.Tensor:
    """Smooth random images, uint8 (count, 3, SIDE, SIDE)."""
    small = torch.rand(count, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bicubic")
    return (255 * large).clamp(0, 255).to(torch.uint8)


def refract(images: torch.Tensor) -> Callable[[], torch.Tensor]:
    augmenter, count = Augmenter(POLICY, seed=0), iter(range(10**9))

    def run() -> torch.Tensor:
        epoch = next(count)
        return torch_batch.run([augmenter.draw((SIDE, SIDE), epoch=epoch, index=i) for i in range(len(images))], images)

    return run


def kornia(images: torch.Tensor) -> Callable[[], torch.Tensor]:
    import kornia.augmentation as K

    transform = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomResizedCrop((SIDE, SIDE), scale=(0.5, 1.0)),
        K.RandomAffine(15.0, (0.1, 0.1), (0.9, 1.1), 5.0, p=1.0),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0),
        K.RandomErasing(p=1.0, scale=(0.02, 0.33), ratio=(0.3, 3.3)),
        same_on_batch=False,
    )
    floats = images.float() / 255
    return lambda: transform(floats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    images = random_images(args.batch)
    calls = {"refract": refract(images), "kornia": kornia(images)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(args.rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - start
            if tuple(result.shape) != tuple(images.shape):
                raise RuntimeError(f"{name} gave {tuple(result.shape)}")
            if number:  # the first warms up
                times[name].append(1000 * elapsed)
    rows = {name: summary(values) for name, values in times.items()}
    for name, row in rows.items():
        row["refract_is_faster_by"] = round(row["median"] / rows["refract"]["median"], 2)
        print(
            f"{name:<10} {row['median']:8.1f} ms a batch of {args.batch} (p95 {row['p95']:.1f})  {row['refract_is_faster_by']:.2f}×"
        )
    write(
        args.json,
        {"environment": environment("refract", "kornia", "torch"), "batch": args.batch, "side": SIDE, "rows": rows},
    )


if __name__ == "__main__":
    main()
