"""Geometric ops: each defines a 3×3 matrix and an output size, so that consecutive ops fuse to one resampling.

A matrix maps points of the op's output to points of its input, in continuous coordinates (x right, y down; pixel i covers [i, i+1)).
A chain is resampled once, from the source image, so a later op reads pixels beyond an earlier op's crop. A rotation after a crop fills
its corners with the image around the crop, and with `fill` only beyond the source's edge.

Parameters of several ops:

- `fill`: grey level or RGB in 0…255, the colour beyond the image.
- `border`: `constant` (the fill), `edge` (repeats the last pixel), `reflect` (reflection including the last pixel; torchvision's
  `symmetric`) or `reflect101` (reflection about the centre of the last pixel, which is not repeated; torchvision's `reflect`).
- `interpolation`: `bilinear` or `bicubic` (Keys 1981, with a = −0.75, as OpenCV and PyTorch).

The last op of a chain that has `fill` and `border` sets them for the chain. A chain is bicubic if one of its ops is.
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
"""A 3×3 matrix in row-major order. Nine plain floats: the overhead of an array exceeds the arithmetic."""


@dataclass(frozen=True, kw_only=True)
class GeometricOp(Op):
    """An op that is one 3×3 matrix on pixel coordinates."""

    kind: ClassVar[str] = "geometric"

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[Matrix, Size]:
        """Return (matrix from output points to input points, output (height, width)) for an input of `size`."""
        raise NotImplementedError

    @staticmethod
    def output_size(args: Args, size: Size) -> Size:
        """Return (height, width) of the output; the default is the input's size."""
        return size


@dataclass(frozen=True, kw_only=True)
class HorizontalFlip(GeometricOp):
    """Flip left and right. Exact."""

    p: float = 0.5

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {}

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[Matrix, Size]:
        return matrix(-1, 0, size[1], 0, 1, 0), size


@dataclass(frozen=True, kw_only=True)
class AlternatingFlip(HorizontalFlip):
    """Flip left and right in every second epoch: half of the images in even epochs, the other half in odd epochs. Exact.

    Two consecutive epochs show both orientations of each image. p: fraction of the images that the op flips. Inside a composition op
    it is a plain `HorizontalFlip`. Source: Jordan 2024, arXiv:2404.00498, section 3.6.
    """

    by_epoch: ClassVar[bool] = False
    p: float = 1.0

    def steps(self, rng: np.random.Generator, size: Size, epoch: int) -> list[Step]:
        if rng.random() >= self.p:
            return []
        return [Step(self.name, {})] if (rng.random() < 0.5) != bool(epoch % 2) else []


@dataclass(frozen=True, kw_only=True)
class VerticalFlip(GeometricOp):
    """Flip top and bottom. Exact."""

    p: float = 0.5

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {}

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[Matrix, Size]:
        return matrix(1, 0, 0, 0, -1, size[0]), size


@dataclass(frozen=True, kw_only=True)
class Transpose(GeometricOp):
    """Transpose the image: rows become columns, and height and width are swapped. Exact."""

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
    """Rotate counter-clockwise by 90° × a number drawn from `turns`, each equally likely. Exact.

    turns: one or several of 0, 1, 2, 3. Odd numbers swap height and width.
    """

    turns: int | tuple[int, ...] = (0, 1, 2, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        turns = self.turns if isinstance(self.turns, (list, tuple)) else (self.turns,)
        if not turns or not all(type(turn) is int and 0 <= turn <= 3 for turn in turns):
            raise ValueError(
                f"turns: {self.turns!r} is not a number of quarter turns; accepted: 0, 1, 2, 3 or a list of them"
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
    """Return the affine matrix of (x, y) → (ax + by + c, dx + ey + f)."""
    return (a, b, c, d, e, f, 0.0, 0.0, 1.0)


def product(m: Matrix, n: Matrix) -> Matrix:
    """Return m · n: n applies first, then m."""
    a, b, c, d, e, f, g, h, i = m
    p, q, r, s, t, u, v, w, x = n
    return (
        a * p + b * s + c * v, a * q + b * t + c * w, a * r + b * u + c * x,
        d * p + e * s + f * v, d * q + e * t + f * w, d * r + e * u + f * x,
        g * p + h * s + i * v, g * q + h * t + i * w, g * r + h * u + i * x,
    )  # fmt: skip


def random_offset(rng: np.random.Generator, margin: int) -> int:
    """Draw a uniform integer between 0 and `margin`, the image's side minus the crop's; negative if the crop is larger."""
    return min(0, margin) + below(rng, abs(margin) + 1)


def check_border(op: Any) -> None:
    """Validate the op's `fill` and `border`."""
    op._set("fill", color("fill", op.fill))
    op._set("border", choice("border", op.border, BORDERS))


def check_interpolation(op: Any) -> None:
    """Validate the op's `interpolation`."""
    op._set("interpolation", choice("interpolation", op.interpolation, INTERPOLATIONS))


def sampling(op: Any) -> Args:
    """Return the interpolation as an argument of a step; empty for bilinear, a plan's default."""
    return {} if op.interpolation == "bilinear" else {"interpolation": op.interpolation}


def outside(op: Any) -> Args:
    """Return `border` and `fill` as arguments of a step."""
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
