"""Convert the images that an `Augmenter` accepts to the executors' input: encoded bytes or uint8 H×W×3 RGB."""

import os
import sys
from typing import TYPE_CHECKING, TypeAlias

import cv2
import numpy as np

from refract.augment.decoding.decode import ImageError, from_pillow, image_size

if TYPE_CHECKING:
    from PIL.Image import Image

ImageInput: TypeAlias = "bytes | np.ndarray | Image"

_ACCEPTED = "encoded bytes, a Pillow image, or a uint8 array H×W or H×W×1 (grey), H×W×3 (RGB) or H×W×4 (RGBA)"


def read_image(image: ImageInput, *, color_profile: str = "ignore") -> bytes | np.ndarray:
    """Return encoded bytes and uint8 H×W×3 arrays unchanged; convert every other accepted image to uint8 H×W×3.

    Grey is repeated for the three channels and transparency is laid over white, as in `refract.augment.decoding.decode`. A Pillow image's
    EXIF orientation is applied, and its ICC profile if color_profile is `convert`. ImageError lists the accepted inputs.
    """
    if isinstance(image, bytes):
        return image
    if not isinstance(image, np.ndarray):
        pillow = sys.modules.get("PIL.Image")  # without this module no Pillow image can exist
        if pillow is not None and isinstance(image, pillow.Image):
            return from_pillow(image, color_profile=color_profile)
        hint = (
            "read a file by Path(path).read_bytes()"
            if isinstance(image, str | os.PathLike)
            else "convert a buffer by bytes(data)"
        )
        raise ImageError(f"expected {_ACCEPTED}, got {type(image).__name__}; {hint}")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
        raise _unsupported_array(image)
    channels = image.shape[2] if image.ndim == 3 else 1
    if channels == 3:
        return image
    if channels == 1:
        return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_GRAY2RGB)
    if channels == 4:
        from PIL import Image

        return from_pillow(Image.fromarray(np.ascontiguousarray(image), "RGBA"))
    raise _unsupported_array(image)


def input_size(image: bytes | np.ndarray) -> tuple[int, int]:
    """Return (height, width) in pixels of the result of `read_image`. Encoded bytes: read from the header; ImageError as `decode`."""
    return image_size(image) if isinstance(image, bytes) else (image.shape[0], image.shape[1])


def _unsupported_array(image: np.ndarray) -> ImageError:
    hint = ""
    if image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[2] not in (1, 3, 4):
        hint = "; channels come last: image.transpose(1, 2, 0)"
    elif image.dtype != np.uint8:
        hint = "; scale to 0…255 and convert by image.astype(np.uint8)"
    return ImageError(f"expected {_ACCEPTED}, got {image.dtype} {'×'.join(map(str, image.shape))}{hint}")
