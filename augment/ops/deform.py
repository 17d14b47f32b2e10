"""Non-linear warps: a displacement field maps each output pixel to an input point. Bilinear, with a reflected border."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import cv2
import numpy as np

from refract.augment.on_device import on_device
from refract.augment.ops.base import Args, Size, below, between, interval, number, whole
from refract.augment.ops.pixel import PixelOp, to_uint8
from refract.augment.random import TABLE_SIZE, normal_table, stretch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class DeformOp(PixelOp):
    """An op that is one coordinate map."""

    @staticmethod
    def maps(args: Args, size: Size) -> tuple[np.ndarray, np.ndarray]:
        """Return (x, y), both float32 of `size`: the input point of each output pixel. Pixel centres are at integers."""
        raise NotImplementedError

    @classmethod
    def on_image(cls, args: Args, image: np.ndarray) -> np.ndarray:
        x, y = cls.maps(args, image.shape[:2])
        return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)

    @classmethod
    def on_batch(cls, args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        import torch
        import torch.nn.functional as F

        height, width = images.shape[-2:]
        maps = np.stack([np.stack(cls.maps(drawn, (height, width)), -1) for drawn in args])
        # grid_sample's coordinates run from −1 at the left edge to 1 at the right edge.
        grid = on_device((2 * maps + 1) / (width, height) - 1, images.device, torch.float32)
        sampled = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        return to_uint8(sampled)


_CUBIC_GAIN = 0.857
"""Standard deviation of unit-variance numbers after OpenCV's cubic interpolation in two directions."""


@dataclass(frozen=True, kw_only=True)
class ElasticDeform(DeformOp):
    """Move each pixel by a smooth random displacement field.

    alpha: standard deviation of the displacement in pixels, at least 0, drawn uniformly. sigma: length scale of the field in pixels,
    at least 1.
    Source: Simard et al. 2003, "Best practices for convolutional neural networks applied to visual document analysis", section 2.
    Deviations: cubic interpolation of normal numbers on a grid of spacing 2·sigma, in place of uniform numbers blurred by a Gaussian of
    sigma (as smooth, and 30 times as fast at sigma 10); alpha is the displacement itself, not a factor before the blur.
    """

    alpha: float | tuple[float, float] = (1.0, 4.0)
    sigma: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("alpha", interval("alpha", self.alpha, 0, 1000))
        self._set("sigma", number("sigma", self.sigma, 1, 1000))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        alpha = between(rng, self.alpha)
        return {"alpha": alpha, "sigma": self.sigma, "offset": below(rng, TABLE_SIZE)}

    @staticmethod
    def maps(args: Args, size: Size) -> tuple[np.ndarray, np.ndarray]:
        height, width = size
        rows, columns = (max(2, round(side / (2 * args["sigma"]))) for side in size)
        knots = stretch(normal_table(), args["offset"], rows * columns * 2).reshape(rows, columns, 2)
        field = cv2.resize(np.ascontiguousarray(knots), (width, height), interpolation=cv2.INTER_CUBIC)
        x, y = cv2.split(field * np.float32(args["alpha"] / _CUBIC_GAIN))
        return x + np.arange(width, dtype=np.float32), y + np.arange(height, dtype=np.float32)[:, None]


@dataclass(frozen=True, kw_only=True)
class GridDistortion(DeformOp):
    """Stretch each column and each row of a grid by a separate factor. The grid as a whole keeps its size.

    cells: number of cells along each side, at least 1. distortion: a in [0, 1); factors are drawn uniformly from [1 − a, 1 + a].
    """

    cells: int = 5
    distortion: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("cells", whole("cells", self.cells, 1))
        if number("distortion", self.distortion, 0, 1) == 1:
            raise ValueError("distortion: 1 allows a cell of width zero; accepted: [0, 1)")

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        low, high = 1 - self.distortion, 1 + self.distortion
        return {side: rng.uniform(low, high, self.cells).tolist() for side in ("rows", "columns")}

    @staticmethod
    def maps(args: Args, size: Size) -> tuple[np.ndarray, np.ndarray]:
        y, x = (_stretched(args[side], length) for side, length in zip(("rows", "columns"), size, strict=True))
        return np.broadcast_to(x, size).copy(), np.broadcast_to(y[:, None], size).copy()


def _stretched(factors: Sequence[float], length: int) -> np.ndarray:
    """Return the input position of each of `length` pixel centres. Output cell i covers an input width proportional to factors[i]."""
    ends = np.concatenate([[0], np.cumsum(factors)]) * (length / sum(factors))
    positions = np.interp(np.arange(length) + 0.5, np.linspace(0, length, len(ends)), ends)
    return (positions - 0.5).astype(np.float32)


DEFORM: Mapping[str, type[PixelOp]] = MappingProxyType(
    {"ElasticDeform": ElasticDeform, "GridDistortion": GridDistortion}
)
