"""Draws docs/gallery/KIND.jpg, each op on an image that the script paints itself: python docs/make_gallery.py"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_preview import boat, house
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from refract.augment import Augmenter
from refract.augment.ops.corruption import CORRUPTIONS
from refract.augment.registry import OPS

TILE, GAP, LINE, VARIANTS, COLUMNS = 120, 6, 15, 3, 3

# Parameters that an op needs in addition to the defaults, to run or to show its effect.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "CenterCrop": {"size": [90, 90]},
    "RandomCrop": {"size": [90, 90]},
    "PadAndCrop": {"padding": 30},
    "Pad": {"size": [150, 190]},
    "Resize": {"size": [120, 60]},
    "ShortestSide": {"size": 40},
    "LongestSide": {"size": 40},
    "RandomResizedCrop": {"size": 120},
    "RandomScale": {"scale": [0.2, 1.0]},
    "Affine": {"degrees": 25, "translate": 0.1, "scale": [0.7, 1.2], "shear": 15},
    "Contrast": {"factor": [0.2, 2.0]},
    "Saturation": {"factor": [0.0, 2.5]},
    "Hue": {"turns": 0.5},
    "ColorJitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "RGBShift": {"levels": 50},
    "PCALighting": {"sigma": 0.6},
    "Posterize": {"bits": [1, 3]},
    "GaussianNoise": {"sigma": [0.05, 0.2]},
    "LaplaceNoise": {"sigma": [0.05, 0.2]},
    "SpeckleNoise": {"sigma": [0.1, 0.4]},
    "PoissonNoise": {"photons": [5, 30]},
    "GaussianBlur": {"sigma": [0.5, 3.0]},
    "Sharpen": {"factor": [0.0, 6.0]},
    "JPEGCompression": {"quality": [3, 15]},
    "Cutout": {"length": 0.4},
    "ElasticDeform": {"alpha": [2.0, 6.0], "sigma": 8},
    "MixUp": {"alpha": 1.0},
    "Compose": {"ops": ["Rotate", "Brightness"]},
    "Sometimes": {"ops": [{"Invert": {"p": 1}}], "otherwise": ["Rotate"]},
    "OneOf": {"ops": ["Rotate", {"Invert": {"p": 1}}, {"Grayscale": {"p": 1}}]},
    "SomeOf": {"ops": ["Rotate", {"Invert": {"p": 1}}, "Cutout"]},
    "During": {"ops": [{"Invert": {"p": 1}}], "epochs": [1, 1]},
    "Ramp": {"ops": [{"Rotate": {"degrees": [0, 0]}}, {"Rotate": {"degrees": [60, 60]}}], "epochs": [0, 2]},
    "AugMix": {"severity": 8},
    "ThirdPartyTransform": {"transform": "albumentations.RandomSunFlare"},
}


def variants(name: str, parameters: Mapping[str, Any], image: np.ndarray, other: np.ndarray) -> list[np.ndarray]:
    """What an op makes of the image in epochs 0, 1 and 2."""
    augmenter = Augmenter([{name: {**parameters, "p": 1.0}}], seed=11)
    if not augmenter.mixes:
        return [augmenter(image, epoch=epoch, index=2) for epoch in range(VARIANTS)]
    batch = torch.from_numpy(np.stack([image, other])).permute(0, 3, 1, 2)
    mixed = [augmenter.mix(batch, torch.eye(2), epoch=epoch, indices=(0, 1))[0][0] for epoch in range(VARIANTS)]
    return [one.round().to(torch.uint8).permute(1, 2, 0).numpy() for one in mixed]


def sheet(rows: Mapping[str, list[np.ndarray]]) -> Image.Image:
    """Each name with its images, three of them in a line."""
    font = ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 11)
    width = VARIANTS * (TILE + 2) + 2 * GAP
    height = TILE * 3 // 4 + LINE + GAP
    lines = -(-len(rows) // COLUMNS)
    canvas = Image.new("RGB", (min(COLUMNS, len(rows)) * width + GAP, lines * height + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for place, (name, images) in enumerate(rows.items()):
        left, top = GAP + place % COLUMNS * width, GAP + place // COLUMNS * height
        draw.text((left, top), name, "black", font)
        for number, pixels in enumerate(images):
            thumb = Image.fromarray(pixels)
            thumb.thumbnail((TILE, TILE * 3 // 4))
            canvas.paste(thumb, (left + number * (TILE + 2), top + LINE))
    return canvas


def main() -> None:
    image, other = (np.array(paint().resize((160, 120), Image.Resampling.LANCZOS)) for paint in (house, boat))
    folder = Path(__file__).with_name("gallery")
    folder.mkdir(exist_ok=True)
    for kind in dict.fromkeys(op.kind for op in OPS.values() if op.kind != "text"):
        rows = {
            name: variants(name, SETTINGS.get(name, {}), image, other) for name, op in OPS.items() if op.kind == kind
        }
        rows.pop("Corruption", None)  # they have a separate sheet
        sheet(rows).save(folder / f"{kind}.jpg", quality=80)
    rows = {
        name: [
            Augmenter([{"Corruption": {"names": name, "severity": level}}])(image, epoch=0, index=1)
            for level in (1, 3, 5)
        ]
        for name in CORRUPTIONS
    }
    sheet(rows).save(folder / "corruptions.jpg", quality=80)
    print(f"wrote {', '.join(str(path) for path in sorted(folder.iterdir()))}")


if __name__ == "__main__":
    main()
