"""JPEG bytes → augmented 224² sample on one core, beside albumentations, torchvision v2 and timm.

The recipe for all: RandomResizedCrop(224, 0.08…1), flip, ColorJitter(0.4, 0.4, 0.4, 0.1) with p = 0.8, RandomErasing with p = 0.25.
The output for all: a contiguous uint8 tensor 3×224×224 (normalisation belongs to the device). Rounds of the peers are interleaved.
The 12-megapixel pictures are the first eight of DIR enlarged to 4000×3000 by a cubic, with a sensor's noise of 3 grey levels, as JPEG of
quality 90 with halved chroma: as large as a phone's.

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
import simplejpeg
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from augment import Augmenter, planes
from benchmarks.report import environment, summary, write

SIZE, SCALE, RATIO = 224, (0.08, 1.0), (3 / 4, 4 / 3)
JITTER = (0.4, 0.4, 0.4, 0.1)
Sample = Callable[[int], torch.Tensor]


def refract(load: Callable[[int], bytes | np.ndarray]) -> Sample:
    augmenter = Augmenter("imagenet", seed=0)
    count = iter(range(10**9))

    def sample(i: int) -> torch.Tensor:
        image = augmenter(load(i), epoch=next(count), index=i)
        return torch.from_numpy(planes(image))

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


def from_bytes(files: list[bytes]) -> dict[str, Sample]:
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]

    def pillow(i: int) -> Image.Image:
        return Image.open(io.BytesIO(files[i])).convert("RGB")

    return {
        "refract": refract(lambda i: files[i]),
        "albumentations (cv2 decode)": albumentations_peer(
            lambda i: cv2.imdecode(np.frombuffer(files[i], np.uint8), cv2.IMREAD_COLOR_RGB)
        ),
        "torchvision v2 (decode_jpeg, tensor)": torchvision_peer(
            lambda i: decode_jpeg(tensors[i], mode="RGB"), pil=False
        ),
        "torchvision v2 (PIL)": torchvision_peer(pillow, pil=True),
        "timm create_transform": timm_peer(pillow),
    }


def enlarged(array: np.ndarray) -> bytes:
    image = cv2.resize(array, (4000, 3000), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng(0).normal(0, 3, image.shape).astype(np.float32)
    return simplejpeg.encode_jpeg(np.clip(image + noise, 0, 255).astype(np.uint8), 90, "RGB", "420")


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
    arrays = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) for data in files]
    pictures = [Image.fromarray(array) for array in arrays]
    tensors_of = [torch.from_numpy(array).permute(2, 0, 1).contiguous() for array in arrays]
    pixels = np.mean([array.shape[0] * array.shape[1] for array in arrays])
    print(
        f"{len(files)} JPEG files, {np.mean([len(data) for data in files]) / 1e3:.0f} kB and {pixels / 1e6:.2f} megapixels on average"
    )
    large = [enlarged(array) for array in arrays[:8]]
    print(f"{len(large)} enlarged to 12 megapixels, {np.mean([len(data) for data in large]) / 1e6:.1f} MB on average")
    cases = {
        "from JPEG bytes": from_bytes(files),
        "from JPEG bytes of 12 megapixels": from_bytes(large),
        "decoded before": {
            "refract": refract(lambda i: arrays[i]),
            "albumentations": albumentations_peer(lambda i: arrays[i]),
            "torchvision v2 (tensor)": torchvision_peer(lambda i: tensors_of[i], pil=False),
            "torchvision v2 (PIL)": torchvision_peer(lambda i: pictures[i], pil=True),
            "timm create_transform": timm_peer(lambda i: pictures[i]),
        },
    }
    counts = {name: len(large) if "12" in name else len(files) for name in cases}
    report = {
        "files": len(files),
        "mean_megapixels": round(pixels / 1e6, 3),
        "large_mean_bytes": round(np.mean([len(data) for data in large])),
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
        "cases": {name: measure(name, peers, counts[name], args.rounds) for name, peers in cases.items()},
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
