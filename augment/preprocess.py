"""`Preprocess`: the preprocessing of validation, evaluation and serving, from image bytes to the network's uint8 input."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from refract.augment.decoding.color_profiles import check_color_profile
from refract.augment.decoding.decode import decode, image_size
from refract.augment.executors import cpu, encoded
from refract.augment.ops.geometric import matrix
from refract.augment.passes import WarpPass
from refract.augment.resize_libraries import LIBRARIES, REFRACT, check_interpolation, resized_centre
from refract.augment.statistics import KINDS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """Convert an image of any size to the network's input, identically in validation, evaluation and serving.

    height, width: the size of the result, in pixels.
    resize: `crop` takes the centre crop of the result's aspect ratio, `crop_ratio` of the shorter side; `squash` takes the whole image and
    changes its aspect ratio.
    mean, std: of RGB in 0…1. normalize: one of `refract.augment.statistics.KINDS`. The network's first layer applies these three, not
    this class.
    color_profile: `convert` converts encoded images to sRGB by their embedded profile; `ignore` does not. Bundles without this field
    ignore profiles.
    interpolation: what resizes: `refract`; `pillow` or `torchvision` as timm's evaluation transform does with them, see
    `refract.augment.resize_libraries.resized_centre`.
    ValueError names a field that is out of range.
    """

    height: int
    width: int
    resize: str = "crop"
    crop_ratio: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    normalize: str = "channel"
    color_profile: str = "ignore"
    interpolation: str = REFRACT

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"height, width: {self.height}×{self.width} pixels are not positive")
        if self.resize not in ("crop", "squash"):
            raise ValueError(f"resize: {self.resize!r} is neither crop nor squash")
        if not 0 < self.crop_ratio <= 1:
            raise ValueError(f"crop_ratio: {self.crop_ratio} is not in (0, 1]")
        if self.normalize not in KINDS:
            raise ValueError(f"normalize: {self.normalize!r} is not one of {', '.join(KINDS)}")
        check_color_profile(self.color_profile)
        check_interpolation(self.interpolation)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean, std: {self.mean}, {self.std} are not three numbers each, std positive")

    def __call__(self, image: bytes | np.ndarray, *, max_pixels: int | None = None) -> np.ndarray:
        """Return the network's input, uint8 height×width×3. image: encoded bytes or uint8 H×W×3. ImageError as `decode`."""
        if self.interpolation != REFRACT:
            pixels = (
                image
                if isinstance(image, np.ndarray)
                else decode(image, max_pixels=max_pixels, color_profile=self.color_profile)
            )
            return self._by_library(pixels)
        if isinstance(image, np.ndarray):
            return cpu.run([self._warp(image.shape[:2])], image)
        size = image_size(image)
        # Decode the whole image: simplejpeg, the decoder for a server's untrusted input, does not crop.
        return encoded.run(
            [self._warp(size)],
            image,
            size,
            cropped=False,
            max_pixels=max_pixels,
            color_profile=self.color_profile,
        )

    def _by_library(self, pixels: np.ndarray) -> np.ndarray:
        size = self.height, self.width
        if self.resize == "squash":
            return LIBRARIES[self.interpolation](pixels, size, None)
        return resized_centre(pixels, size, self.crop_ratio, self.interpolation)

    def _warp(self, size: tuple[int, ...]) -> WarpPass:
        height, width = size
        if self.resize == "squash":
            return WarpPass(
                matrix(width / self.width, 0, 0, 0, height / self.height, 0), (self.height, self.width), "edge"
            )
        step = self.crop_ratio * min(height / self.height, width / self.width)
        left, top = (width - step * self.width) / 2, (height - step * self.height) / 2
        return WarpPass(matrix(step, 0, left, 0, step, top), (self.height, self.width), "edge")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values. `interpolation` is only written for a library: stored embeddings have these values in their key."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if self.interpolation == REFRACT:
            del values["interpolation"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocess":
        """Read the result of `to_dict`. ValueError names a missing or unknown field."""
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        try:
            return cls(**plain)
        except TypeError as error:
            raise ValueError(f"preprocess: {str(error).replace('Preprocess.__init__() ', '')}") from error
