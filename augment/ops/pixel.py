"""Ops on each pixel by itself that are no colour map, above all noise. They bring their own execution for both executors.

The batch halves take `images`, a uint8 tensor N×3×H×W on any device, and use its methods only: this file does not import torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import cv2
import numpy as np

from augment.ops.op import Args, Op, Size, interval
from augment.random import TABLE_SIZE, normal_table, stretch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class PixelOp(Op):
    kind: ClassVar[str] = "pixel"

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        """A new uint8 H×W×3 array; `image` is not changed."""
        raise NotImplementedError

    @staticmethod
    def on_batch(args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        """A new uint8 N×3×H×W tensor, sample i with args[i]; `images` is not changed."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(PixelOp):
    """Add independent normal noise to every value.

    sigma: standard deviation as a share of the full range (0.1 is 25.5 grey levels), in [0, 1], drawn uniformly from the pair.
    The noise is a stretch of one fixed table from a drawn offset (`augment.random.normal_table`).
    """

    sigma: float | tuple[float, float] = (0.0, 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("sigma", interval("sigma", self.sigma, 0, 1))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"sigma": float(rng.uniform(*self.sigma)), "offset": int(rng.integers(TABLE_SIZE))}  # type: ignore[misc]

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        noise = stretch(normal_table(), args["offset"], image.size).reshape(image.shape)
        return cv2.addWeighted(image, 1.0, noise, 255 * args["sigma"], 0.0, dtype=cv2.CV_8U)

    @staticmethod
    def on_batch(args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        import torch

        count, channels, height, width = images.shape
        amount = images.new_tensor([255 * a["sigma"] for a in args], dtype=torch.float32).view(-1, 1, 1, 1)
        noise = batch_stretch(normal_table(), [a["offset"] for a in args], images, channels * height * width)
        noise = noise.view(count, height, width, channels).permute(0, 3, 1, 2)
        return (images + amount * noise).round_().clamp_(0, 255).to(images.dtype)


def batch_stretch(table: np.ndarray, offsets: Sequence[int], like: "torch.Tensor", count: int) -> "torch.Tensor":
    """`augment.random.stretch` for each offset: (N, count) on the device of `like`, which supplies the device only."""
    import torch

    source = _table_on(table, like.device)
    steps = torch.arange(count, device=like.device)
    starts = torch.tensor(offsets, device=like.device).view(-1, 1)
    return source[(starts + steps) % table.size]


_tables: dict[tuple[int, str], "torch.Tensor"] = {}


def _table_on(table: np.ndarray, device: "torch.device") -> "torch.Tensor":
    """The table on the device, copied there once."""
    import torch

    key = (id(table), str(device))
    if key not in _tables:
        _tables[key] = torch.tensor(table, device=device)
    return _tables[key]


PIXEL: Mapping[str, type[PixelOp]] = MappingProxyType({"GaussianNoise": GaussianNoise})
