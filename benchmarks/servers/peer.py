"""What the servers of peers share: an image as people prepare it themselves."""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torchvision.transforms.v2 import functional


def pixels(data: bytes, size: Sequence[int]) -> torch.Tensor:
    """The bytes of an image as uint8 of 3 × height × width: the shorter side scaled by Pillow, the middle cut out."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scaled = functional.resize(image, [round(size[0] / 0.875)])
    return functional.pil_to_tensor(functional.center_crop(scaled, list(size)))
