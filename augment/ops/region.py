"""Ops that paint over boxes of the picture: (top, left, height, width) in pixels, inside the picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from augment.ops.op import Args, Op, Size, color, interval, number, whole
from augment.random import TABLE_SIZE, stretch, uniform_table

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class RegionOp(Op):
    """Drawn as `boxes` and either `fill` (RGB) or `offset` (of the table of random pixels)."""

    kind: ClassVar[str] = "region"

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        """A new uint8 H×W×3 array; `image` is not changed."""
        image = image.copy()
        for top, left, height, width in args["boxes"]:
            image[top : top + height, left : left + width] = _paint(args, height, width)
        return image

    @staticmethod
    def on_batch(args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        """A new uint8 N×3×H×W tensor, sample i with args[i]; `images` is not changed."""
        images = images.clone()
        for image, drawn in zip(images, args, strict=True):
            for top, left, height, width in drawn["boxes"]:
                paint = np.broadcast_to(_paint(drawn, height, width), (height, width, 3))
                # Copies a box's pixels to the device only where they are random: a constant goes as three numbers.
                if "offset" in drawn:
                    source = image.new_tensor(paint.transpose(2, 0, 1).copy())
                else:
                    source = image.new_tensor(drawn["fill"]).view(3, 1, 1)
                image[:, top : top + height, left : left + width] = source
        return images


def _paint(args: Args, height: int, width: int) -> np.ndarray:
    if "offset" in args:
        return stretch(uniform_table(), args["offset"], height * width * 3).reshape(height, width, 3)
    return np.array(args["fill"], dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class Cutout(RegionOp):
    """Paint squares over, each centred on a uniform pixel, so that they may reach over the edge and are cut there.

    length: the square's side, in pixels where a whole number, as a share of the shorter side where a fraction in (0, 1).
    holes: how many squares. fill: grey level or RGB in 0…255.
    Source: DeVries & Taylor 2017, arXiv:1708.04552, section 3.
    """

    length: int | float = 16
    holes: int = 1
    fill: int | tuple[int, int, int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.length, float) and self.length < 1:
            number("length", self.length, 0, 1)
        else:
            whole("length", self.length, 1)
        self._set("holes", whole("holes", self.holes, 1))
        self._set("fill", color("fill", self.fill))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        height, width = size
        side = self.length if isinstance(self.length, int) else max(1, round(self.length * min(size)))
        boxes = []
        for _ in range(self.holes):
            top, left = int(rng.integers(height)) - side // 2, int(rng.integers(width)) - side // 2
            bottom, right = min(top + side, height), min(left + side, width)
            top, left = max(top, 0), max(left, 0)
            if bottom > top and right > left:
                boxes.append([top, left, bottom - top, right - left])
        return {"boxes": boxes, "fill": list(self.fill)}  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class RandomErasing(RegionOp):
    """Paint one box of a random share of the area and a random ratio over, inside the picture.

    scale: share of the area, in (0, 1]; ratio: height / width, drawn uniformly in its logarithm; value: `random` (each pixel its own
    uniform colour), a grey level or RGB in 0…255. After 100 draws that do not fit, nothing is erased.
    Source: Zhong et al. 2020, arXiv:1708.04896, algorithm 1. Deviation: the paper draws the ratio uniformly, this (as torchvision)
    uniformly in its logarithm, so that tall and wide are equally likely.
    """

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    value: str | int | tuple[int, int, int] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("scale", interval("scale", self.scale, 1e-4, 1))
        self._set("ratio", interval("ratio", self.ratio, 1e-2, 1e2))
        if isinstance(self.value, str):
            if self.value != "random":
                raise ValueError(
                    f"value: {self.value!r} is neither random, nor a grey level 0…255, nor a list of three of them"
                )
        else:
            self._set("value", color("value", self.value))

    def draw(self, rng: np.random.Generator, size: Size) -> Args | None:
        height, width = size
        low, high = (math.log(edge) for edge in self.ratio)
        for _ in range(100):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(low, high))
            box_height, box_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < box_height <= height and 0 < box_width <= width:
                top, left = int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1))
                random = isinstance(self.value, str)
                paint = {"offset": int(rng.integers(TABLE_SIZE))} if random else {"fill": list(self.value)}  # type: ignore[arg-type]
                return {"boxes": [[top, left, box_height, box_width]], **paint}
        return None


REGION: Mapping[str, type[RegionOp]] = MappingProxyType({"Cutout": Cutout, "RandomErasing": RandomErasing})
