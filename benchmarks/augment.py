"""JPEG bytes → augmented 224² sample on one core, beside albumentations, torchvision v2 and timm.

The recipe for all: RandomResizedCrop(224, 0.08…1), flip, ColorJitter(0.4, 0.4, 0.4, 0.1) with p = 0.8, RandomErasing with p = 0.25.
The output for all: a contiguous uint8 tensor 3×224×224 (normalisation belongs to the device). Rounds of the peers are interleaved.

    python -m benchmarks.augment --images DIR --json benchmarks/results/augment.json
"""

import argparse
import io
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations
import cv2
import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from augment import Augmenter
from benchmarks.report import environment, summary, write

SIZE, SCALE, RATIO = 224, (0.08, 1.0), (3 / 4, 4 / 3)
JITTER = (0.4, 0.4, 0.4, 0.1)
Sample = Callable[[int], torch.Tensor]


def refract(load: Callable[[int], bytes | np.ndarray]) -> Sample:
    augmenter = Augmenter("imagenet", seed=0)
    count = iter(range(10**9))

    def sample(i: int) -> torch.Tensor:
        image = augmenter(load(i), epoch=next(count), index=i)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    return sample


def albumentations_peer(load: Callable[[int], np.ndarray]) -> Sample:
    transform = albumentations.Compose(
        [
            albumentations.RandomResizedCrop((SIZE, SIZE), scale=SCALE, ratio=RATIO),
            albumentations.HorizontalFlip(p=0.5),
            albumentations.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=0.8),
            albumentations.Erasing(scale=(0.02, 0.33), ratio=(0.3, 3.3), fill="random", p=0.25),
            albumentations.ToTensorV2(),
        ]
    )
    return lambda i: transform(image=load(i))["image"].contiguous()


def torchvision_peer(load: Callable[[int], torch.Tensor | Image.Image], *, pil: bool) -> Sample:
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=SCALE, ratio=RATIO, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(*JITTER)], p=0.8),
            *([v2.PILToTensor()] if pil else []),
            v2.RandomErasing(
                p=0.25, scale=(0.02, 0.33), ratio=(0.3, 3.3), value=0
            ),  # random values need float pixels there
        ]
    )
    return lambda i: transform(load(i)).contiguous()


def timm_peer(load: Callable[[int], Image.Image]) -> Sample:
    transform = create_transform(
        SIZE, is_training=True, scale=SCALE, ratio=RATIO, hflip=0.5, color_jitter=JITTER, color_jitter_prob=0.8, re_prob=0.25,
        re_mode="const", interpolation="bilinear", normalize=False,
    )  # fmt: skip
    return lambda i: transform(load(i)).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG files")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in sorted(args.images.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    arrays = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) for data in files]
    pictures = [Image.fromarray(array) for array in arrays]
    planes = [torch.from_numpy(array).permute(2, 0, 1).contiguous() for array in arrays]
    pixels = np.mean([array.shape[0] * array.shape[1] for array in arrays])
    print(
        f"{len(files)} JPEG files, {np.mean([len(data) for data in files]) / 1e3:.0f} kB and {pixels / 1e6:.2f} megapixels on average"
    )
    cases = {
        "from JPEG bytes": {
            "refract": refract(lambda i: files[i]),
            "albumentations (cv2 decode)": albumentations_peer(
                lambda i: cv2.imdecode(np.frombuffer(files[i], np.uint8), cv2.IMREAD_COLOR_RGB)
            ),
            "torchvision v2 (decode_jpeg, tensor)": torchvision_peer(
                lambda i: decode_jpeg(tensors[i], mode="RGB"), pil=False
            ),
            "torchvision v2 (PIL)": torchvision_peer(
                lambda i: Image.open(io.BytesIO(files[i])).convert("RGB"), pil=True
            ),
            "timm create_transform": timm_peer(lambda i: Image.open(io.BytesIO(files[i])).convert("RGB")),
        },
        "decoded before": {
            "refract": refract(lambda i: arrays[i]),
            "albumentations": albumentations_peer(lambda i: arrays[i]),
            "torchvision v2 (tensor)": torchvision_peer(lambda i: planes[i], pil=False),
            "torchvision v2 (PIL)": torchvision_peer(lambda i: pictures[i], pil=True),
            "timm create_transform": timm_peer(lambda i: pictures[i]),
        },
    }
    report = {
        "files": len(files),
        "mean_megapixels": round(pixels / 1e6, 3),
        "environment": environment(
            "refract",
            "albumentations",
            "torchvision",
            "timm",
            "torch",
            "opencv-python-headless",
            "simplejpeg",
            "pillow",
        ),
        "cases": {name: measure(name, peers, len(files), args.rounds) for name, peers in cases.items()},
    }
    write(args.json, report)


def measure(title: str, peers: dict[str, Sample], count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a picture: one number a round, each round over all files, the peers in turn."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    for round_number in range(rounds + 1):
        for name, sample in peers.items():
            start = time.perf_counter()
            for i in range(count):
                result = sample(i)
            elapsed = time.perf_counter() - start
            if (result.dtype, tuple(result.shape)) != (torch.uint8, (3, SIZE, SIZE)):
                raise RuntimeError(f"{name} gave {result.dtype} {tuple(result.shape)}")
            if round_number:  # the first warms up
                times[name].append(1000 * elapsed / count)
    rows = {name: summary(values) for name, values in times.items()}
    ours = rows["refract"]["median"]
    print(
        f"\n{title}: milliseconds a picture, median of {rounds} rounds (p95), images a second, Refract's speed over it"
    )
    for name, row in rows.items():
        row["images_per_second"] = round(1000 / row["median"], 1)
        row["refract_is_faster_by"] = round(row["median"] / ours, 3)
        print(
            f"  {name:<38} {row['median']:7.3f} ({row['p95']:.3f})  {row['images_per_second']:7.1f}/s  {row['refract_is_faster_by']:.2f}×"
        )
    return rows


if __name__ == "__main__":
    main()
