"""JPEG bytes → augmented 224² sample on one core, compared with albumentations, torchvision v2 and timm.

The recipe for all: RandomResizedCrop(224, 0.08…1), flip, ColorJitter(0.4, 0.4, 0.4, 0.1) with p = 0.8, RandomErasing with p = 0.25.
The output for all: a contiguous tensor 3×224×224, by default float32, normalised by ImageNet's mean and standard deviation: by
albumentations' Normalize and ToTensorV2, torchvision's ToDtype and Normalize, timm's defaults. `--form uint8` leaves normalisation to the
device. Rounds of the peers are interleaved.
The 12-megapixel images are the first eight of DIR enlarged to 4000×3000 by a cubic, with a sensor's noise of 3 grey levels, as JPEG of
quality 90 with halved chroma: as large as a phone's.

    python -m benchmarks.augment --images DIR --json benchmarks/results/augment_float32.json
    python -m benchmarks.augment --images DIR --form uint8 --json benchmarks/results/augment.json
"""

import argparse
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

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

from benchmarks.report import environment, summary, write
from refract.augment import Augmenter
from refract.augment.preprocess import IMAGENET_MEAN, IMAGENET_STD

SIZE, SCALE, RATIO = 224, (0.08, 1.0), (3 / 4, 4 / 3)
JITTER = (0.4, 0.4, 0.4, 0.1)
DTYPES = {"float32": torch.float32, "uint8": torch.uint8}
Sample = Callable[[int], torch.Tensor]


def refract(load: Callable[[int], bytes | np.ndarray], form: str) -> Sample:
    augmenter = Augmenter("imagenet", seed=0, output="float32" if form == "float32" else "uint8_chw")
    count = iter(range(10**9))
    return lambda i: torch.from_numpy(augmenter(load(i), epoch=next(count), index=i))


def albumentations_peer(load: Callable[[int], np.ndarray], form: str) -> Sample:
    transform = albumentations.Compose(
        [
            albumentations.RandomResizedCrop((SIZE, SIZE), scale=SCALE, ratio=RATIO),
            albumentations.HorizontalFlip(p=0.5),
            albumentations.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=0.8),
            albumentations.Erasing(scale=(0.02, 0.33), ratio=(0.3, 3.3), fill="random", p=0.25),
            *([albumentations.Normalize(IMAGENET_MEAN, IMAGENET_STD)] if form == "float32" else []),
            albumentations.ToTensorV2(),
        ]
    )
    return lambda i: transform(image=load(i))["image"].contiguous()


def torchvision_peer(load: Callable[[int], torch.Tensor | Image.Image], form: str, *, pil: bool) -> Sample:
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=SCALE, ratio=RATIO, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(*JITTER)], p=0.8),
            *([v2.PILToTensor()] if pil else []),
            *(normalise if form == "float32" else []),
            v2.RandomErasing(p=0.25, scale=(0.02, 0.33), ratio=(0.3, 3.3), value=0),  # its fastest setting
        ]
    )
    return lambda i: transform(load(i)).contiguous()


def timm_peer(load: Callable[[int], Image.Image], form: str) -> Sample:
    transform = create_transform(
        SIZE, is_training=True, scale=SCALE, ratio=RATIO, hflip=0.5, color_jitter=JITTER, color_jitter_prob=0.8, re_prob=0.25,
        re_mode="const", interpolation="bilinear", normalize=form == "float32", mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip
    return lambda i: transform(load(i)).contiguous()


def from_bytes(files: list[bytes], form: str) -> dict[str, Sample]:
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]

    def pillow(i: int) -> Image.Image:
        return Image.open(io.BytesIO(files[i])).convert("RGB")

    return {
        "refract": refract(lambda i: files[i], form),
        "albumentations (cv2 decode)": albumentations_peer(lambda i: decoded(files[i]), form),
        "torchvision v2 (decode_jpeg, tensor)": torchvision_peer(
            lambda i: decode_jpeg(tensors[i], mode="RGB"), form, pil=False
        ),
        "torchvision v2 (PIL)": torchvision_peer(pillow, form, pil=True),
        "timm create_transform": timm_peer(pillow, form),
    }


def decoded(data: bytes) -> np.ndarray:
    array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert array is not None
    return array


def enlarged(array: np.ndarray) -> bytes:
    image: np.ndarray = cv2.resize(array, (4000, 3000), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng(0).normal(0, 3, image.shape).astype(np.float32)
    return simplejpeg.encode_jpeg(np.clip(image + noise, 0, 255).astype(np.uint8), 90, "RGB", "420")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG files")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--form", choices=DTYPES, default="float32", help="format of every peer's output tensor")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in sorted(args.images.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
    arrays = [decoded(data) for data in files]
    images = [Image.fromarray(array) for array in arrays]
    tensors_of = [torch.from_numpy(array).permute(2, 0, 1).contiguous() for array in arrays]
    pixels = np.mean([array.shape[0] * array.shape[1] for array in arrays])
    print(
        f"{len(files)} JPEG files, {np.mean([len(data) for data in files]) / 1e3:.0f} kB and {pixels / 1e6:.2f} megapixels on average"
    )
    large = [enlarged(array) for array in arrays[:8]]
    print(f"{len(large)} enlarged to 12 megapixels, {np.mean([len(data) for data in large]) / 1e6:.1f} MB on average")
    cases = {
        "from JPEG bytes": from_bytes(files, args.form),
        "from JPEG bytes of 12 megapixels": from_bytes(large, args.form),
        "decoded before": {
            "refract": refract(lambda i: arrays[i], args.form),
            "albumentations": albumentations_peer(lambda i: arrays[i], args.form),
            "torchvision v2 (tensor)": torchvision_peer(lambda i: tensors_of[i], args.form, pil=False),
            "torchvision v2 (PIL)": torchvision_peer(lambda i: images[i], args.form, pil=True),
            "timm create_transform": timm_peer(lambda i: images[i], args.form),
        },
    }
    counts = {name: len(large) if "12" in name else len(files) for name in cases}
    report = {
        "form": args.form,
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
        "cases": {name: measure(name, peers, counts[name], args.rounds, args.form) for name, peers in cases.items()},
    }
    write(args.json, report)


def measure(title: str, peers: dict[str, Sample], count: int, rounds: int, form: str) -> dict[str, dict[str, float]]:
    """Return the wall-clock and processor milliseconds per image, one value per round. A round covers all files; the peers take turns."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    processor: dict[str, list[float]] = {name: [] for name in peers}
    for round_number in range(rounds + 1):
        for name, sample in peers.items():
            start, busy = time.perf_counter(), time.process_time()
            for i in range(count):
                result = sample(i)
            elapsed, busy = time.perf_counter() - start, time.process_time() - busy
            if (result.dtype, tuple(result.shape)) != (DTYPES[form], (3, SIZE, SIZE)):
                raise RuntimeError(f"{name} gave {result.dtype} {tuple(result.shape)}")
            if round_number:  # the first warms up
                times[name].append(1000 * elapsed / count)
                processor[name].append(1000 * busy / count)
    rows = {name: summary(values) for name, values in times.items()}
    ours, ours_busy = rows["refract"]["median"], median(processor["refract"])
    print(
        f"\n{title}, {form}: milliseconds an image, median of {rounds} rounds (p95), images a second, Refract's speed over it, "
        "the same by processor time"
    )
    for name, row in rows.items():
        row["processor_median"] = round(median(processor[name]), 4)
        row["images_per_second"] = round(1000 / row["median"], 1)
        row["refract_is_faster_by"] = round(row["median"] / ours, 3)
        row["refract_is_faster_by_processor"] = round(row["processor_median"] / ours_busy, 3)
        print(
            f"  {name:<38} {row['median']:7.3f} ({row['p95']:.3f})  {row['images_per_second']:7.1f}/s  "
            f"{row['refract_is_faster_by']:.2f}×  {row['refract_is_faster_by_processor']:.2f}×"
        )
    return rows


if __name__ == "__main__":
    main()
