"""Draws the README's preview grid from three images that it paints itself: python docs/make_preview.py"""

import io
from pathlib import Path

from PIL import Image, ImageDraw

from refract.augment import Augmenter
from refract.pipeline.preview import Shown, preview_grid


def house() -> Image.Image:
    image = Image.new("RGB", (500, 375), (150, 200, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 260, 500, 375), fill=(90, 150, 70))
    draw.ellipse((390, 30, 460, 100), fill=(250, 220, 90))
    draw.rectangle((150, 160, 330, 300), fill=(200, 90, 70), outline="black", width=3)
    draw.polygon(((130, 160), (240, 70), (350, 160)), fill=(110, 60, 50))
    draw.rectangle((215, 220, 260, 300), fill=(70, 45, 30))
    for left in (168, 278):
        draw.rectangle((left, 185, left + 34, 215), fill=(240, 240, 200), outline="black", width=2)
    return image


def boat() -> Image.Image:
    image = Image.new("RGB", (500, 375), (240, 190, 150))
    draw = ImageDraw.Draw(image)
    for row in range(220, 375, 10):
        draw.rectangle((0, row, 500, row + 10), fill=(30, 70 + (row - 220) // 3, 130 + (row - 220) // 4))
    draw.polygon(((120, 240), (380, 240), (330, 300), (170, 300)), fill=(120, 70, 40))
    draw.polygon(((245, 60), (245, 230), (370, 230)), fill=(250, 250, 245))
    draw.polygon(((235, 90), (235, 230), (150, 230)), fill=(220, 60, 60))
    draw.line((240, 50, 240, 240), fill=(60, 40, 30), width=5)
    return image


def fruit() -> Image.Image:
    image = Image.new("RGB", (375, 500), (245, 240, 230))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 330, 375, 500), fill=(160, 120, 80))
    draw.ellipse((40, 200, 200, 360), fill=(210, 40, 50))
    draw.ellipse((170, 230, 320, 380), fill=(240, 160, 40))
    draw.ellipse((110, 290, 240, 420), fill=(110, 180, 60))
    draw.line((120, 205, 140, 160), fill=(80, 50, 30), width=7)
    draw.ellipse((140, 150, 200, 180), fill=(60, 140, 60))
    return image


def draw() -> Image.Image:
    images = []
    for index, paint in enumerate((house, boat, fruit)):
        buffer = io.BytesIO()
        paint().save(buffer, "JPEG", quality=92)
        images.append(Shown(paint.__name__, buffer.getvalue(), index))
    policy = [
        {"RandomResizedCrop": {"size": 224, "scale": [0.3, 1.0]}},
        {"Rotate": {"degrees": 20, "p": 0.5}},
        {"HorizontalFlip": {"p": 0.5}},
        {"ColorJitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}},
        {"GaussianNoise": {"sigma": [0.0, 0.1], "p": 0.3}},
        {"RandomErasing": {"p": 0.3}},
    ]
    return preview_grid(images, Augmenter(policy, seed=11), variants=5)


def main() -> None:
    draw().quantize(192).save(Path(__file__).parent / "preview.png", optimize=True)


if __name__ == "__main__":
    main()
