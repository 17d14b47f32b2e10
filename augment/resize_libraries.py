"""Resizing by another library, for networks whose clients preprocess with it: bilinear with antialiasing, by Pillow or torchvision."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

REFRACT = "refract"
"""The resampling that Refract does itself."""

MOST_PIXELS = 16 << 20
"""Pixels of the largest resized image from which the centre is cut. Of longer images, Pillow computes the centre alone."""

Box = tuple[float, float, float, float]
"""(top, bottom, left, right) in pixels of an image, inside it."""


def with_pillow(image: np.ndarray, size: tuple[int, int], box: Box | None = None) -> np.ndarray:
    """Resize the box by `PIL.Image.resize`, which torchvision's transforms call for Pillow's images. It may read pixels beyond the box.

    A box on whole pixels is cut out first, as torchvision's crops do. Arguments: as for all functions of LIBRARIES.
    """
    if box is not None and all(edge == round(edge) for edge in box):
        image, box = _cut(image, box), None
    return _by_pillow(image, size, box)


def _by_pillow(image: np.ndarray, size: tuple[int, int], box: Box | None) -> np.ndarray:
    from PIL import Image

    height, width = size
    edges = None if box is None else (box[2], box[0], box[3], box[1])
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, edges))  # writable


def with_torchvision(image: np.ndarray, size: tuple[int, int], box: Box | None = None) -> np.ndarray:
    """Resize the box, rounded to whole pixels, by torchvision's transforms for tensors. Pillow's result differs by one level at most."""
    import torch
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    part = np.ascontiguousarray(image if box is None else _cut(image, box))
    # A copy: PyTorch warns about arrays that cannot be written.
    tensor = torch.from_numpy(part if part.flags.writeable else part.copy()).permute(2, 0, 1)
    resized = resize(tensor, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    return np.ascontiguousarray(resized.permute(1, 2, 0).numpy())


LIBRARIES: Mapping[str, Callable[[np.ndarray, tuple[int, int], Box | None], np.ndarray]] = MappingProxyType(
    {"pillow": with_pillow, "torchvision": with_torchvision}
)
"""Library → function of (uint8 H×W×3, (height, width) of the result, box or None for the whole image) → uint8 height×width×3."""


def check_interpolation(value: str) -> None:
    """Check that a value is `refract` or one of LIBRARIES; ValueError otherwise."""
    if value != REFRACT and value not in LIBRARIES:
        raise ValueError(f"interpolation: {value!r} is not one of {', '.join((REFRACT, *LIBRARIES))}")


def resized_centre(image: np.ndarray, size: tuple[int, int], crop_ratio: float, library: str) -> np.ndarray:
    """Resize as timm's evaluation transform: to `size` / `crop_ratio`, rounded down, with the aspect ratio kept; then cut out the centre.

    For a square, torchvision's `Resize` and `CenterCrop` give the same. image: uint8 H×W×3. Returns uint8 height×width×3.
    """
    rows, columns = image.shape[:2]
    goal = math.floor(size[0] / crop_ratio), math.floor(size[1] / crop_ratio)
    if goal[0] == goal[1]:
        shorter = min(rows, columns)
        height, width = (goal[0] if side == shorter else int(goal[0] * side / shorter) for side in (rows, columns))
    else:
        ratio = min(rows / goal[0], columns / goal[1])
        height, width = round(rows / ratio), round(columns / ratio)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    if height * width > MOST_PIXELS:
        down, across = rows / height, columns / width
        box = (top * down, min((top + size[0]) * down, rows), left * across, min((left + size[1]) * across, columns))
        return _by_pillow(image, size, box)
    whole = LIBRARIES[library](image, (height, width), None)
    return np.ascontiguousarray(whole[top : top + size[0], left : left + size[1]])


def _cut(image: np.ndarray, box: Box) -> np.ndarray:
    top, bottom, left, right = map(round, box)
    rows, columns = image.shape[:2]
    top, left = min(top, rows - 1), min(left, columns - 1)
    return image[top : max(bottom, top + 1), left : max(right, left + 1)]
