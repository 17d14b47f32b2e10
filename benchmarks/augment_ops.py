"""Compare each op at 224² and 512² on one core with albumentations, torchvision v2, imgaug, kornia and Pillow.

The program compares the same calls twice. In the first comparison, every library reads and returns a uint8 H×W×3 array; libraries with
another format convert both ways. In the second, every library reads and returns its own format (uint8 3×H×W tensor, float 1×3×H×W tensor,
Pillow image), and the conversion is not counted. Each library draws its own parameters if it has an op that draws them. The cell of a
library without such an op is empty. The strengths are alike.

    python -m benchmarks.augment_ops --image photo.jpg --json benchmarks/results/augment_ops.json
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
warnings.simplefilter("ignore")

import albumentations as A
import cv2
import kornia.augmentation as K
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import v2

from benchmarks.report import environment, write
from refract.augment import Augmenter
from refract.augment.ops.external import _imgaug

iaa: Any = _imgaug()[0]
RNG = np.random.default_rng(0)
NEAR = v2.InterpolationMode.BILINEAR
OWN = "_own_form"


def u(low: float, high: float) -> float:
    return float(RNG.uniform(low, high))


# op → spec for Refract, and a transform for each peer, built once (Pillow: a function, as its ops draw nothing).
def rows(side: int) -> dict[str, dict[str, Any]]:
    crop = side * 3 // 4
    sigma = 12.75
    return {
        "HorizontalFlip": {
            "refract": {}, "albumentations": A.HorizontalFlip(p=1), "torchvision": v2.RandomHorizontalFlip(1),
            "imgaug": iaa.Fliplr(1.0), "kornia": K.RandomHorizontalFlip(p=1), "pillow": ImageOps.mirror,
        },
        "VerticalFlip": {
            "refract": {}, "albumentations": A.VerticalFlip(p=1), "torchvision": v2.RandomVerticalFlip(1),
            "imgaug": iaa.Flipud(1.0), "kornia": K.RandomVerticalFlip(p=1), "pillow": ImageOps.flip,
        },
        "Rot90": {
            "refract": {"turns": 1}, "albumentations": A.Rotate((90, 90), p=1), "imgaug": iaa.Rot90(1),
            "pillow": lambda im: im.transpose(Image.Transpose.ROTATE_90),
        },
        "Transpose": {
            "refract": {}, "albumentations": A.Transpose(p=1), "pillow": lambda im: im.transpose(Image.Transpose.TRANSPOSE),
        },
        "RandomCrop": {
            "refract": {"size": crop}, "albumentations": A.RandomCrop(crop, crop), "torchvision": v2.RandomCrop(crop),
            "imgaug": iaa.CropToFixedSize(crop, crop), "kornia": K.RandomCrop((crop, crop)),
            "pillow": lambda im: im.crop((9, 9, 9 + crop, 9 + crop)),
        },
        "Resize": {
            "refract": {"size": crop}, "albumentations": A.Resize(crop, crop), "torchvision": v2.Resize((crop, crop), antialias=True),
            "imgaug": iaa.Resize({"height": crop, "width": crop}, interpolation="linear"),
            "kornia": K.Resize((crop, crop)), "pillow": lambda im: im.resize((crop, crop), Image.Resampling.BILINEAR),
        },
        "RandomResizedCrop": {
            "refract": {"size": side}, "albumentations": A.RandomResizedCrop((side, side)),
            "torchvision": v2.RandomResizedCrop(side, antialias=True), "kornia": K.RandomResizedCrop((side, side)),
        },
        "Rotate": {
            "refract": {"degrees": 30}, "albumentations": A.Rotate(30, p=1), "torchvision": v2.RandomRotation(30, NEAR),
            "imgaug": iaa.Rotate((-30, 30)), "kornia": K.RandomRotation(30.0, p=1),
            "pillow": lambda im: im.rotate(u(-30, 30), Image.Resampling.BILINEAR),
        },
        "Affine": {
            "refract": {"degrees": 20, "translate": 0.1, "scale": [0.8, 1.2], "shear": 10},
            "albumentations": A.Affine(scale=(0.8, 1.2), translate_percent=(-0.1, 0.1), rotate=(-20, 20), shear=(-10, 10), p=1),
            "torchvision": v2.RandomAffine(20, (0.1, 0.1), (0.8, 1.2), 10, NEAR),
            "imgaug": iaa.Affine(scale=(0.8, 1.2), translate_percent=(-0.1, 0.1), rotate=(-20, 20), shear=(-10, 10)),
            "kornia": K.RandomAffine(20.0, (0.1, 0.1), (0.8, 1.2), 10.0, p=1),
        },
        "Perspective": {
            "refract": {"distortion": 0.3}, "albumentations": A.Perspective((0.05, 0.15), p=1),
            "torchvision": v2.RandomPerspective(0.3, 1.0), "imgaug": iaa.PerspectiveTransform((0.05, 0.15)),
            "kornia": K.RandomPerspective(0.3, p=1),
        },
        "ElasticDeform": {
            "refract": {"alpha": 3, "sigma": 8}, "albumentations": A.ElasticTransform(50, 8, p=1),
            "torchvision": v2.ElasticTransform(50.0, 8.0), "imgaug": iaa.ElasticTransformation(50, 8),
            "kornia": K.RandomElasticTransform((49, 49), (8.0, 8.0), (1.0, 1.0), p=1),
        },
        "GridDistortion": {"refract": {}, "albumentations": A.GridDistortion(p=1)},
        "Brightness": {
            "refract": {"factor": 0.4}, "albumentations": A.ColorJitter((0.6, 1.4), (1, 1), (1, 1), (0, 0), p=1),
            "torchvision": v2.ColorJitter(0.4), "imgaug": iaa.Multiply((0.6, 1.4)), "kornia": K.RandomBrightness((0.6, 1.4), p=1),
            "pillow": lambda im: ImageEnhance.Brightness(im).enhance(u(0.6, 1.4)),
        },
        "Contrast": {
            "refract": {"factor": 0.4}, "albumentations": A.ColorJitter((1, 1), (0.6, 1.4), (1, 1), (0, 0), p=1),
            "torchvision": v2.ColorJitter(0, 0.4), "imgaug": iaa.LinearContrast((0.6, 1.4)), "kornia": K.RandomContrast((0.6, 1.4), p=1),
            "pillow": lambda im: ImageEnhance.Contrast(im).enhance(u(0.6, 1.4)),
        },
        "Saturation": {
            "refract": {"factor": 0.4}, "albumentations": A.ColorJitter((1, 1), (1, 1), (0.6, 1.4), (0, 0), p=1),
            "torchvision": v2.ColorJitter(0, 0, 0.4), "imgaug": iaa.MultiplySaturation((0.6, 1.4)),
            "kornia": K.RandomSaturation((0.6, 1.4), p=1), "pillow": lambda im: ImageEnhance.Color(im).enhance(u(0.6, 1.4)),
        },
        "Hue": {
            "refract": {"turns": 0.1}, "albumentations": A.ColorJitter((1, 1), (1, 1), (1, 1), (-0.1, 0.1), p=1),
            "torchvision": v2.ColorJitter(0, 0, 0, 0.1), "imgaug": iaa.AddToHue((-25, 25)), "kornia": K.RandomHue((-0.1, 0.1), p=1),
        },
        "ColorJitter": {
            "refract": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
            "albumentations": A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=1),
            "torchvision": v2.ColorJitter(0.4, 0.4, 0.4, 0.1), "kornia": K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1),
        },
        "Grayscale": {
            "refract": {}, "albumentations": A.ToGray(p=1), "torchvision": v2.RandomGrayscale(1.0), "imgaug": iaa.Grayscale(1.0),
            "kornia": K.RandomGrayscale(p=1), "pillow": lambda im: im.convert("L").convert("RGB"),
        },
        "Invert": {
            "refract": {}, "albumentations": A.InvertImg(p=1), "torchvision": v2.RandomInvert(1.0), "imgaug": iaa.Invert(1.0),
            "kornia": K.RandomInvert(p=1), "pillow": ImageOps.invert,
        },
        "ChannelShuffle": {
            "refract": {}, "albumentations": A.ChannelShuffle(p=1), "torchvision": v2.RandomChannelPermutation(),
            "imgaug": iaa.ChannelShuffle(1.0), "kornia": K.RandomChannelShuffle(p=1),
        },
        "RGBShift": {
            "refract": {"levels": 20}, "albumentations": A.RGBShift(20, 20, 20, p=1), "imgaug": iaa.Add((-20, 20), per_channel=True),
            "kornia": K.RandomRGBShift(0.08, 0.08, 0.08, p=1),
        },
        "Gamma": {
            "refract": {"gamma": [0.7, 1.4]}, "albumentations": A.RandomGamma((70, 140), p=1), "imgaug": iaa.GammaContrast((0.7, 1.4)),
            "kornia": K.RandomGamma((0.7, 1.4), p=1),
        },
        "Solarize": {
            "refract": {"threshold": 128}, "albumentations": A.Solarize((0.5, 0.5), p=1), "torchvision": v2.RandomSolarize(128, 1.0),
            "imgaug": iaa.Solarize(1.0, threshold=128), "kornia": K.RandomSolarize(0.0, 0.0, p=1),
            "pillow": lambda im: ImageOps.solarize(im, 128),
        },
        "Posterize": {
            "refract": {"bits": 4}, "albumentations": A.Posterize(4, p=1), "torchvision": v2.RandomPosterize(4, 1.0),
            "imgaug": iaa.Posterize(4), "kornia": K.RandomPosterize(4.0, p=1), "pillow": lambda im: ImageOps.posterize(im, 4),
        },
        "AutoContrast": {
            "refract": {}, "albumentations": A.AutoContrast(p=1), "torchvision": v2.RandomAutocontrast(1.0),
            "imgaug": iaa.pillike.Autocontrast(0), "kornia": K.RandomAutoContrast(p=1), "pillow": ImageOps.autocontrast,
        },
        "Equalize": {
            "refract": {}, "albumentations": A.Equalize(mode="pil", p=1), "torchvision": v2.RandomEqualize(1.0),
            "imgaug": iaa.pillike.Equalize(), "kornia": K.RandomEqualize(p=1), "pillow": ImageOps.equalize,
        },
        "CLAHE": {"refract": {}, "albumentations": A.CLAHE((1, 4), p=1), "imgaug": iaa.CLAHE((1, 4)), "kornia": K.RandomClahe(p=1)},
        "GaussianNoise": {
            "refract": {"sigma": [0.05, 0.05]}, "albumentations": A.GaussNoise((0.05, 0.05), p=1),
            "torchvision": v2.Compose(
                [v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise(0, 0.05), v2.ToDtype(torch.uint8, scale=True)]
            ),
            "imgaug": iaa.AdditiveGaussianNoise(scale=sigma, per_channel=True), "kornia": K.RandomGaussianNoise(0, 0.05, p=1),
        },
        "PoissonNoise": {"refract": {}, "albumentations": A.ShotNoise(p=1), "imgaug": iaa.AdditivePoissonNoise(20, per_channel=True)},
        "SaltAndPepper": {
            "refract": {"amount": 0.05}, "albumentations": A.SaltAndPepper((0.05, 0.05), p=1), "imgaug": iaa.SaltAndPepper(0.05),
            "kornia": K.RandomSaltAndPepperNoise(0.05, p=1),
        },
        "PixelDropout": {"refract": {"amount": 0.05}, "albumentations": A.PixelDropout(0.05, p=1), "imgaug": iaa.Dropout(0.05)},
        "GaussianBlur": {
            "refract": {"sigma": [0.5, 2.0]}, "albumentations": A.GaussianBlur(0, (0.5, 2.0), p=1),
            "torchvision": v2.GaussianBlur(13, (0.5, 2.0)), "imgaug": iaa.GaussianBlur((0.5, 2.0)),
            "kornia": K.RandomGaussianBlur((13, 13), (0.5, 2.0), p=1), "pillow": lambda im: im.filter(ImageFilter.GaussianBlur(u(0.5, 2))),
        },
        "MotionBlur": {
            "refract": {"length": [7, 11]}, "albumentations": A.MotionBlur((7, 11), p=1), "imgaug": iaa.MotionBlur((7, 11)),
            "kornia": K.RandomMotionBlur((7, 11), 180.0, 0.0, p=1),
        },
        "Sharpen": {
            "refract": {"factor": 2.0}, "albumentations": A.Sharpen(p=1), "torchvision": v2.RandomAdjustSharpness(2.0, 1.0),
            "imgaug": iaa.Sharpen((0.2, 0.5)), "kornia": K.RandomSharpness(1.0, p=1),
            "pillow": lambda im: ImageEnhance.Sharpness(im).enhance(2.0),
        },
        "JPEGCompression": {
            "refract": {"quality": [30, 90]}, "albumentations": A.ImageCompression(quality_range=(30, 90), p=1),
            "torchvision": v2.JPEG((30, 90)), "imgaug": iaa.JpegCompression((10, 70)),
        },
        "CoarseDropout": {
            "refract": {"holes": 4, "size": 0.1},
            "albumentations": A.CoarseDropout((4, 4), (0.1, 0.1), (0.1, 0.1), p=1), "imgaug": iaa.Cutout(4, size=0.1, squared=False),
        },
        "RandomErasing": {
            "refract": {"value": 0}, "albumentations": A.Erasing(p=1), "torchvision": v2.RandomErasing(1.0),
            "kornia": K.RandomErasing(p=1),
        },
        "GridMask": {"refract": {}, "albumentations": A.GridDropout(p=1)},
    }  # fmt: skip


def ours(name: str, parameters: dict[str, Any], image: np.ndarray) -> Callable[[], Any]:
    augmenter = Augmenter([{name: {**parameters, "p": 1.0}}], seed=0)
    count = iter(range(10**9))
    return lambda: augmenter(image, epoch=next(count), index=0)


def callers(peer: str, transform: Any, image: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Return the peer's call from array to array, and if its own format differs, the call in that format."""
    if peer == "albumentations":
        compose = A.Compose([transform])
        return {peer: lambda: compose(image=image)["image"]}
    if peer == "imgaug":
        return {peer: lambda: transform(image=image)}
    if peer == "pillow":
        pillow_image = Image.fromarray(image)
        return {
            peer: lambda: np.array(transform(Image.fromarray(image))),
            peer + OWN: lambda: transform(pillow_image),
        }
    planes = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    if peer == "torchvision":
        return {
            peer: lambda: transform(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).contiguous().numpy(),
            peer + OWN: lambda: transform(planes),
        }
    floats = planes[None].float() / 255
    return {peer: lambda: array_of(transform(tensor_of(image))), peer + OWN: lambda: transform(floats)}


def tensor_of(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


def array_of(tensor: torch.Tensor) -> np.ndarray:
    return (tensor[0] * 255).round_().clamp_(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def works(call: Callable[[], Any]) -> bool:
    """Some ops of imgaug 0.4.0 do not run on today's NumPy and OpenCV."""
    try:
        call()
    except Exception as error:
        print(f"    {type(error).__name__}: {str(error)[:100]}")
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True, help="a photo, which the program resizes to the sides")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 512])
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    photo = cv2.imread(str(args.image), cv2.IMREAD_COLOR_RGB)
    if photo is None:
        parser.error(f"--image {args.image}: OpenCV cannot read it; expected an image")
    report: dict[str, Any] = {
        "environment": environment(
            "refract", "albumentations", "torchvision", "imgaug", "kornia", "pillow", "opencv-python-headless"
        ),
        "sides": {},
    }
    for side in args.sides:
        image = cv2.resize(photo, (side, side), interpolation=cv2.INTER_AREA)
        report["sides"][side] = measure(side, image, args.rounds)
    write(args.json, report)


def measure(side: int, image: np.ndarray, rounds: int) -> dict[str, Any]:
    """Return microseconds per call, the median over rounds. The peers take turns in each round."""
    results: dict[str, Any] = {}
    print(
        f"\n{side}×{side}: microseconds an image; Refract's speed over the fastest peer, array to array and own form to own form"
    )
    for name, entries in rows(side).items():
        calls: dict[str, Callable[[], Any]] = {}
        for peer, entry in entries.items():
            calls |= {peer: ours(name, entry, image)} if peer == "refract" else callers(peer, entry, image)
        broken = [peer for peer, call in calls.items() if not works(call)]
        for peer in broken:
            print(f"  {name}: {peer} fails here and is skipped")
            del calls[peer]
        times: dict[str, list[float]] = {peer: [] for peer in calls}
        for number in range(rounds + 1):
            for peer, call in calls.items():
                repeats = 50 if not times[peer] or times[peer][-1] < 2000 else 1
                start = time.perf_counter()
                for _ in range(repeats):
                    call()
                if number:  # the first warms up
                    times[peer].append(1e6 * (time.perf_counter() - start) / repeats)
        row: dict[str, Any] = {peer: round(median(values), 1) for peer, values in times.items()}
        owns = {peer: value for peer, value in row.items() if peer != "refract" and peer + OWN not in row}
        arrays = {peer: value for peer, value in row.items() if peer != "refract" and not peer.endswith(OWN)}
        cells = "  ".join(f"{peer} {value:.0f}" for peer, value in row.items())
        for label, times_of in (("fastest_peer", arrays), ("fastest_peer" + OWN, owns)):
            row[label] = min(times_of, key=times_of.__getitem__)
            row[f"over_{label}"] = round(times_of[row[label]] / row["refract"], 2)
        results[name] = row
        print(f"  {name:<18} {row['over_fastest_peer']:6.2f}×  {row['over_fastest_peer' + OWN]:6.2f}×   {cells}")
    for label in ("over_fastest_peer", "over_fastest_peer" + OWN):
        ratios = [row[label] for row in results.values()]
        print(
            f"  {label}: at least as fast on {sum(r >= 1 for r in ratios)} of {len(ratios)} rows; worst {min(ratios):.2f}×"
        )
    return results


if __name__ == "__main__":
    main()
