"""Ops that move pixels: each gives a 3×3 matrix and an output size, so that neighbours fuse to one resampling.

A matrix maps points of the op's output to points of its input, in continuous coordinates (x right, y down; pixel i covers [i, i+1)).
Because a chain is resampled once, from the source picture, a later op sees past an earlier op's edge: a crop followed by a rotation
fills its corners with the picture around the crop where there is one, and with `fill` only beyond the source's edge.

Parameters that several ops share: `fill`, grey level or RGB in 0…255, the colour beyond the picture; `border`: `constant` (that fill),
`edge` (the last pixel again) or `reflect` (the picture mirrored, last pixel included). In a chain, the last op that has them decides.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from augment.ops.op import Args, Op, Size, around, choice, color, interval, number, pixels, whole

BORDERS = ("constant", "edge", "reflect")


@dataclass(frozen=True, kw_only=True)
class GeometricOp(Op):
    kind: ClassVar[str] = "geometric"

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[np.ndarray, Size]:
        """(matrix 3×3 float64 from output to input points, output (height, width)) of a drawn op on an input of `size`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class HorizontalFlip(GeometricOp):
    """Mirror left and right. Exact."""

    p: float = 0.5

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {}

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[np.ndarray, Size]:
        return matrix(-1, 0, size[1], 0, 1, 0), size


@dataclass(frozen=True, kw_only=True)
class _Crop(GeometricOp):
    """A box (top, left, height, width) of the input, possibly reaching beyond it, resampled to `size`."""

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[np.ndarray, Size]:
        top, left, height, width = args["box"]
        out_height, out_width = args["size"]
        return matrix(width / out_width, 0, left, 0, height / out_height, top), (out_height, out_width)


@dataclass(frozen=True, kw_only=True)
class RandomCrop(_Crop):
    """Cut `size` (pixels, or [height, width]) at a uniform place; a smaller picture is placed uniformly on `fill`. Exact."""

    size: int | tuple[int, int]
    fill: int | tuple[int, int, int] = 0
    border: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("size", pixels("size", self.size))
        _check_border(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        height, width = pixels("size", self.size)
        top, left = _place(rng, size[0] - height), _place(rng, size[1] - width)
        return {"box": [top, left, height, width], "size": [height, width], **_outside(self)}


@dataclass(frozen=True, kw_only=True)
class PadAndCrop(_Crop):
    """Pad by `padding` pixels on every side, then cut the picture's own size at a uniform place: the classic CIFAR shift. Exact.

    Source: He et al. 2016, "Deep residual learning", section 4.2 (padding 4).
    """

    padding: int = 4
    fill: int | tuple[int, int, int] = 0
    border: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("padding", whole("padding", self.padding, 0))
        _check_border(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        top, left = (int(rng.integers(-self.padding, self.padding + 1)) for _ in range(2))
        return {"box": [top, left, *size], "size": list(size), **_outside(self)}


@dataclass(frozen=True, kw_only=True)
class Resize(_Crop):
    """Resample to `size` (pixels, or [height, width]); the ratio of the sides is not kept."""

    size: int | tuple[int, int]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("size", pixels("size", self.size))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"box": [0, 0, *size], "size": list(pixels("size", self.size))}


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop(_Crop):
    """Cut a box of a random share of the area and a random ratio of the sides, and resample it to `size`.

    scale: share of the picture's area, in (0, 1]; drawn uniformly. ratio: width / height; drawn uniformly in its logarithm.
    Source: Szegedy et al. 2015, "Going deeper with convolutions", section 6. As torchvision's, after ten draws that do not fit the
    largest centred box of a permitted ratio is taken.
    """

    size: int | tuple[int, int] = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("size", pixels("size", self.size))
        self._set("scale", interval("scale", self.scale, 1e-4, 1))
        self._set("ratio", interval("ratio", self.ratio, 1e-2, 1e2))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        height, width = size
        low, high = (math.log(edge) for edge in self.ratio)
        for _ in range(10):
            area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * rng.random())
            ratio = math.exp(low + (high - low) * rng.random())
            box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < box_height <= height and 0 < box_width <= width:
                box = [_place(rng, height - box_height), _place(rng, width - box_width), box_height, box_width]
                break
        else:
            ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
            box_height = min(height, max(1, round(width / ratio)))
            box_width = min(width, max(1, round(height * ratio)))
            box = [(height - box_height) // 2, (width - box_width) // 2, box_height, box_width]
        return {"box": box, "size": list(pixels("size", self.size))}


@dataclass(frozen=True, kw_only=True)
class RandomScale(_Crop):
    """Resample both sides by one factor drawn uniformly from `scale`, each in [0.05, 20]; the output's size follows."""

    scale: tuple[float, float] = (0.8, 1.25)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("scale", interval("scale", self.scale, 0.05, 20))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        factor = rng.uniform(*self.scale)
        return {"box": [0, 0, *size], "size": [max(1, round(side * factor)) for side in size]}


@dataclass(frozen=True, kw_only=True)
class _CentredWarp(GeometricOp):
    """Scale, shear and turn about the centre, then shift; the size stays."""

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[np.ndarray, Size]:
        height, width = size
        angle, shear = math.radians(args["angle"]), math.tan(math.radians(args.get("shear", 0.0)))
        factor = args.get("scale", 1.0)
        shift_y, shift_x = args.get("shift", (0.0, 0.0))
        cos, sin = math.cos(angle), math.sin(angle)
        # Forward: p_out = shift + R(angle) · [[1, shear], [0, 1]] · factor · p_in; counter-clockwise on the screen, where y points down.
        forward = factor * np.array([[cos, cos * shear + sin], [-sin, -sin * shear + cos]])
        a, b, c, d = np.linalg.inv(forward).ravel()
        centre_x, centre_y = width / 2, height / 2
        x, y = centre_x + shift_x * width, centre_y + shift_y * height
        return matrix(a, b, centre_x - a * x - b * y, c, d, centre_y - c * x - d * y), size


@dataclass(frozen=True, kw_only=True)
class Rotate(_CentredWarp):
    """Turn about the centre by an angle drawn uniformly from `degrees` (counter-clockwise; one number a means [−a, a])."""

    degrees: float | tuple[float, float] = 15.0
    fill: int | tuple[int, int, int] = 0
    border: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("degrees", around("degrees", self.degrees, -360, 360, 0))
        _check_border(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"angle": _uniform(rng, self.degrees), **_outside(self)}


@dataclass(frozen=True, kw_only=True)
class Affine(_CentredWarp):
    """Turn, shift, scale and shear about the centre, each drawn uniformly.

    degrees: counter-clockwise; shear: degrees along x, in (−80, 80); both as for `Rotate`. translate: [vertical, horizontal] largest
    shift as a share of the side, in [0, 1]; one number means both. scale: factor, in [0.05, 20].
    """

    degrees: float | tuple[float, float] = 0.0
    translate: float | tuple[float, float] = 0.0
    scale: float | tuple[float, float] = 1.0
    shear: float | tuple[float, float] = 0.0
    fill: int | tuple[int, int, int] = 0
    border: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("degrees", around("degrees", self.degrees, -360, 360, 0))
        pair = self.translate if isinstance(self.translate, (list, tuple)) else (self.translate, self.translate)
        if len(pair) != 2:
            raise ValueError(f"translate: {self.translate!r} is not a number or a pair [vertical, horizontal]")
        self._set("translate", tuple(number("translate", item, 0, 1) for item in pair))
        self._set("scale", interval("scale", self.scale, 0.05, 20))
        self._set("shear", around("shear", self.shear, -80, 80, 0))
        _check_border(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {
            "angle": _uniform(rng, self.degrees),
            "shift": [_uniform(rng, (-edge, edge)) for edge in self.translate],  # type: ignore[union-attr]
            "scale": _uniform(rng, self.scale),
            "shear": _uniform(rng, self.shear),
            **_outside(self),
        }


def matrix(a: float, b: float, c: float, d: float, e: float, f: float) -> np.ndarray:
    """The 3×3 affine matrix of (x, y) → (ax + by + c, dx + ey + f)."""
    return np.array([[a, b, c], [d, e, f], [0.0, 0.0, 1.0]])


def _uniform(rng: np.random.Generator, edges: Any) -> float:
    return float(rng.uniform(*edges))


def _place(rng: np.random.Generator, room: int) -> int:
    """A uniform whole offset between 0 and `room`, which is negative where the crop is the larger."""
    return int(rng.integers(min(0, room), max(0, room) + 1))


def _check_border(op: Any) -> None:
    op._set("fill", color("fill", op.fill))
    op._set("border", choice("border", op.border, BORDERS))


def _outside(op: Any) -> Args:
    return {"border": op.border, "fill": list(op.fill)}


GEOMETRIC: Mapping[str, type[GeometricOp]] = MappingProxyType(
    {
        "HorizontalFlip": HorizontalFlip,
        "RandomCrop": RandomCrop,
        "PadAndCrop": PadAndCrop,
        "Resize": Resize,
        "RandomResizedCrop": RandomResizedCrop,
        "RandomScale": RandomScale,
        "Rotate": Rotate,
        "Affine": Affine,
    }
)
