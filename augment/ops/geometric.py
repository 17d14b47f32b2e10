"""Ops that move pixels: each gives a 3×3 matrix and an output size, so that neighbours fuse to one resampling.

A matrix maps points of the op's output to points of its input, in continuous coordinates (x right, y down; pixel i covers [i, i+1)).
Because a chain is resampled once, from the source image, a later op sees past an earlier op's edge: a crop followed by a rotation
fills its corners with the image around the crop where there is one, and with `fill` only beyond the source's edge.

Parameters that several ops share: `fill`, grey level or RGB in 0…255, the colour beyond the image; `border`: `constant` (that fill),
`edge` (the last pixel again), `reflect` (the image mirrored, last pixel included; torchvision's `symmetric`) or `reflect101` (mirrored
about the centre of the last pixel, which is not repeated; torchvision's `reflect`). In a chain, the last op that has them decides.
`interpolation`: `bilinear` or `bicubic` (Keys 1981, with a = −0.75, as OpenCV and PyTorch). A chain is bicubic where one of its ops is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from refract.augment.ops.base import Args, Op, Size, below, choice, color
from refract.augment.plan import Step

BORDERS = ("constant", "edge", "reflect", "reflect101")
INTERPOLATIONS = ("bilinear", "bicubic")

Matrix = tuple[float, float, float, float, float, float, float, float, float]
"""3×3, row by row, in plain floats: for nine numbers an array costs more than the arithmetic."""


@dataclass(frozen=True, kw_only=True)
class GeometricOp(Op):
    kind: ClassVar[str] = "geometric"

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[Matrix, Size]:
        """(matrix from output to input points, output (height, width)) of a drawn op on an input of `size`."""
        raise NotImplementedError

    @staticmethod
    def output_size(args: Args, size: Size) -> Size:
        """(height, width) of the output; by default the input's."""
        return size


@dataclass(frozen=True, kw_only=True)
class HorizontalFlip(GeometricOp):
    """Mirror left and right. Exact."""

    p: float = 0.5

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {}

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[Matrix, Size]:
        return matrix(-1, 0, size[1], 0, 1, 0), size


@dataclass(frozen=True, kw_only=True)
class AlternatingFlip(HorizontalFlip):
    """Mirror left and right in every second epoch: half of the images in the even ones, the other half in the odd ones. Exact.

    So two epochs in a row show both sides of each image. p: share of the images that it is for. Within a choice op a plain
    `HorizontalFlip`. Source: Jordan 2024, arXiv:2404.00498, section 3.6.
    """

    by_epoch: ClassVar[bool] = False
    p: float = 1.0

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        if rng.random() >= self.p:
            return []
        return [Step(self.name, {})] if (rng.random() < 0.5) != bool(epoch % 2) else []


@dataclass(frozen=True, kw_only=True)
class VerticalFlip(GeometricOp):
    """Mirror top and bottom. Exact."""

    p: float = 0.5

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {}

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[Matrix, Size]:
        return matrix(1, 0, 0, 0, -1, size[0]), size


@dataclass(frozen=True, kw_only=True)
class Transpose(GeometricOp):
    """Mirror about the diagonal from the top left: rows become columns, and the sides change places. Exact."""

    p: float = 0.5

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {}

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[Matrix, Size]:
        return matrix(0, 1, 0, 1, 0, 0), (size[1], size[0])

    @staticmethod
    def output_size(args: Args, size: Size) -> Size:
        return size[1], size[0]


@dataclass(frozen=True, kw_only=True)
class Rot90(GeometricOp):
    """Turn counter-clockwise by a number of quarter turns drawn from `turns`, each equally likely. Exact; odd turns change the sides."""

    turns: int | tuple[int, ...] = (0, 1, 2, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        turns = self.turns if isinstance(self.turns, (list, tuple)) else (self.turns,)
        if not turns or not all(type(turn) is int and 0 <= turn <= 3 for turn in turns):
            raise ValueError(
                f"turns: {self.turns!r} is not one of the numbers of quarter turns 0, 1, 2, 3, nor a list of them"
            )
        self._set("turns", tuple(turns))

    def draw(self, rng: np.random.Generator, size: Size) -> Args | None:
        turns: tuple[int, ...] = self.turns  # type: ignore[assignment]
        drawn = turns[below(rng, len(turns))]
        return {"turns": drawn} if drawn else None

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[Matrix, Size]:
        height, width = size
        if args["turns"] == 1:
            return matrix(0, -1, width, 1, 0, 0), (width, height)
        if args["turns"] == 2:
            return matrix(-1, 0, width, 0, -1, height), size
        return matrix(0, 1, 0, -1, 0, height), (width, height)

    @staticmethod
    def output_size(args: Args, size: Size) -> Size:
        return (size[1], size[0]) if args["turns"] % 2 else size


def matrix(a: float, b: float, c: float, d: float, e: float, f: float) -> Matrix:
    """The affine matrix of (x, y) → (ax + by + c, dx + ey + f)."""
    return (a, b, c, d, e, f, 0.0, 0.0, 1.0)


def product(m: Matrix, n: Matrix) -> Matrix:
    """m · n: first n, then m."""
    a, b, c, d, e, f, g, h, i = m
    p, q, r, s, t, u, v, w, x = n
    return (
        a * p + b * s + c * v, a * q + b * t + c * w, a * r + b * u + c * x,
        d * p + e * s + f * v, d * q + e * t + f * w, d * r + e * u + f * x,
        g * p + h * s + i * v, g * q + h * t + i * w, g * r + h * u + i * x,
    )  # fmt: skip


def random_offset(rng: np.random.Generator, room: int) -> int:
    """A uniform whole offset between 0 and `room`, which is negative where the crop is the larger."""
    return min(0, room) + below(rng, abs(room) + 1)


def check_border(op: Any) -> None:
    op._set("fill", color("fill", op.fill))
    op._set("border", choice("border", op.border, BORDERS))


def check_interpolation(op: Any) -> None:
    op._set("interpolation", choice("interpolation", op.interpolation, INTERPOLATIONS))


def sampling(op: Any) -> Args:
    """The interpolation as an argument of a step; nothing for bilinear, which is the default of a plan."""
    return {} if op.interpolation == "bilinear" else {"interpolation": op.interpolation}


def outside(op: Any) -> Args:
    return {"border": op.border, "fill": list(op.fill)}


GEOMETRIC: Mapping[str, type[GeometricOp]] = MappingProxyType(
    {
        "HorizontalFlip": HorizontalFlip,
        "AlternatingFlip": AlternatingFlip,
        "VerticalFlip": VerticalFlip,
        "Transpose": Transpose,
        "Rot90": Rot90,
    }
)
