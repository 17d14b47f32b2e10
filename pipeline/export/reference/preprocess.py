"""Refract's preprocessing in NumPy: an image becomes the input of an exported network. `preprocess.json` has its settings.

Needs numpy, and Pillow for encoded images. docs/preprocessing.md of Refract has the specification and the bounds of the differences.
    settings = json.load(open("preprocess.json"))
    batch = np.stack([preprocess("photo.jpg", settings)])   # uint8 N×H×W×3
"""

import io

import numpy as np


def preprocess(image, settings):
    """Return the network's input, uint8 height×width×3. image: a path, an open file, or RGB pixels, uint8 H×W×3."""
    rule = settings["preprocess"]
    pixels = image if isinstance(image, np.ndarray) else decode(image, rule["color_profile"])
    if rule.get("interpolation", "refract") != "refract":
        return by_pillow(pixels, rule)
    (rows, columns), height, width = pixels.shape[:2], rule["height"], rule["width"]
    if rule["resize"] == "squash":  # the whole image
        down, across, top, left = rows / height, columns / width, 0.0, 0.0
    else:  # the centre, of the result's aspect ratio
        down = across = rule["crop_ratio"] * min(rows / height, columns / width)
        top, left = (rows - down * height) / 2, (columns - across * width) / 2
    halve_down, halve_across = power_of_two(down), power_of_two(across)
    box = [top, left, top + down * height, left + across * width]
    first_row, first_column, last_row, last_column = map(round, box)
    whole = max(abs(edge - round(edge)) for edge in box) < 1e-4
    if whole and halve_down == halve_across == 1:  # whole pixels without reduction: nothing beyond the box is read
        pixels, top, left = pixels[first_row:last_row, first_column:last_column], 0.0, 0.0
    else:  # the last pixels are repeated up to multiples of the boxes below
        pixels = np.pad(pixels, ((0, -rows % halve_down), (0, -columns % halve_across), (0, 0)), "edge")
    while halve_down > 1 or halve_across > 1:  # means of boxes, against aliasing
        v, h = min(halve_down, 2), min(halve_across, 2)
        boxes = pixels.reshape(pixels.shape[0] // v, v, pixels.shape[1] // h, h, 3).astype(np.uint16)
        pixels = ((boxes.sum(axis=(1, 3)) + v * h // 2) // (v * h)).astype(np.uint8)
        halve_down, down, top = halve_down // v, down / v, top / v
        halve_across, across, left = halve_across // h, across / h, left / h
    upper, lower, y = neighbours(height, down, top, pixels.shape[0])
    before, after, x = neighbours(width, across, left, pixels.shape[1])
    x, y, levels = x[None, :, None], y[:, None, None], pixels.astype(np.float64)
    above = levels[upper][:, before] * (1 - x) + levels[upper][:, after] * x
    below = levels[lower][:, before] * (1 - x) + levels[lower][:, after] * x
    return np.floor(above * (1 - y) + below * y + 0.5).astype(np.uint8)


def by_pillow(pixels, rule):
    """Return the input as Pillow resizes. With `torchvision`, which resizes tensors, a pixel of the training may differ by one level."""
    from PIL import Image

    (rows, columns), height, width = pixels.shape[:2], rule["height"], rule["width"]
    if rule["resize"] == "squash":
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    goal_rows, goal_columns = int(height / rule["crop_ratio"]), int(width / rule["crop_ratio"])
    shorter, ratio = min(rows, columns), min(rows / goal_rows, columns / goal_columns)
    if goal_rows == goal_columns:
        sides = [goal_rows if side == shorter else int(goal_rows * side / shorter) for side in (rows, columns)]
    else:
        sides = [round(rows / ratio), round(columns / ratio)]
    new_rows, new_columns = sides
    top, left = round((new_rows - height) / 2), round((new_columns - width) / 2)
    if new_rows * new_columns > 16 << 20:  # only the centre, as a long image would fill the memory
        down, across = rows / new_rows, columns / new_columns
        right, bottom = min((left + width) * across, columns), min((top + height) * down, rows)
        box = (left * across, top * down, right, bottom)
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, box))
    whole = np.asarray(Image.fromarray(pixels).resize((new_columns, new_rows), Image.Resampling.BILINEAR))
    return whole[top : top + height, left : left + width]


def neighbours(count, step, start, size):
    """Return the two pixels between which each output pixel lies, and its distance from the first. Pixel i has its centre at i + 0.5."""
    centres = (np.arange(count) + 0.5) * step + start - 0.5
    first = np.floor(centres)
    return np.clip(first, 0, size - 1).astype(int), np.clip(first + 1, 0, size - 1).astype(int), centres - first


def power_of_two(step):
    """Return the largest power of two that is at most `step`, at least 1."""
    return 1 << max(0, int(step + 1e-6).bit_length() - 1)


def decode(file, color_profile):
    """Decode an image to RGB: EXIF orientation, 8 bits, with `convert` its colour profile to sRGB, transparency over white."""
    from PIL import Image, ImageOps

    opened = Image.open(file)
    image: Image.Image = ImageOps.exif_transpose(opened) or opened
    profile = (image.info.get("icc_profile") or b"") if color_profile == "convert" else b""
    if image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode in ("L", "LA"):
        image = to_srgb(image.convert("L"), profile)
    else:
        image = to_srgb(image if image.mode == "CMYK" else image.convert("RGBA").convert("RGB"), profile)
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image)


def to_srgb(image, profile):
    """Convert grey, RGB or CMYK to sRGB by an ICC profile. A damaged profile, or one of another colour space, is ignored."""
    from PIL import ImageCms

    space = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}.get(profile[16:20])
    image = image.convert("RGB") if (image.mode, space) == ("L", "RGB") else image
    if image.mode == space:
        try:
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
        except (OSError, ImageCms.PyCMSError):
            pass
    return image.convert("RGB")
