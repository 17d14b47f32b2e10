"""Geometric ops that rotate, shift, shear and tilt the image. They keep its size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from refract.augment.ops.base import Args, Size, around, between, interval, number
from refract.augment.ops.geometric import (
    GeometricOp,
    Matrix,
    check_border,
    check_interpolation,
    matrix,
    outside,
    sampling,
)


@dataclass(frozen=True, kw_only=True)
class _CentredWarp(GeometricOp):
    """Scale, shear and rotate about the centre, then shift. Keeps the size."""

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[Matrix, Size]:
        height, width = size
        angle = math.radians(args.get("angle", 0.0))
        across, down = (math.tan(math.radians(args.get(key, 0.0))) for key in ("shear", "shear_y"))
        factor = args.get("scale", 1.0)
        shift_y, shift_x = args.get("shift", (0.0, 0.0))
        cos, sin = math.cos(angle), math.sin(angle)
        # Forward: p_out = shift + R(angle) · [[1, across], [down, 1]] · factor · p_in; counter-clockwise, y points down.
        forward = (cos + sin * down, cos * across + sin, cos * down - sin, cos - sin * across)
        determinant = factor * (forward[0] * forward[3] - forward[1] * forward[2])
        a, b, c, d = (entry / determinant for entry in (forward[3], -forward[1], -forward[2], forward[0]))
        centre_x, centre_y = width / 2, height / 2
        x, y = centre_x + shift_x * width, centre_y + shift_y * height
        return matrix(a, b, centre_x - a * x - b * y, c, d, centre_y - c * x - d * y), size


@dataclass(frozen=True, kw_only=True)
class Rotate(_CentredWarp):
    """Rotate about the centre by an angle drawn uniformly from `degrees` (counter-clockwise; one number a means [−a, a]).

    border: `constant` (the fill), `edge`, `reflect` or `reflect101`. interpolation: `bilinear` or `bicubic`.
    """

    degrees: float | tuple[float, float] = 15.0
    fill: int | tuple[int, int, int] = 0
    border: str = "constant"
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("degrees", around("degrees", self.degrees, -360, 360, 0))
        check_border(self)
        check_interpolation(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"angle": between(rng, self.degrees), **outside(self), **sampling(self)}


@dataclass(frozen=True, kw_only=True)
class Affine(_CentredWarp):
    """Rotate, shift, scale and shear about the centre, each drawn uniformly.

    degrees: counter-clockwise; shear: degrees along x, in [−80, 80]; one number a means [−a, a]. translate: [vertical, horizontal],
    the largest shift as a fraction of the side, in [0, 1]; one number means both. scale: factor, in [0.05, 20].
    border, interpolation: as for `Rotate`.
    """

    degrees: float | tuple[float, float] = 0.0
    translate: float | tuple[float, float] = 0.0
    scale: float | tuple[float, float] = 1.0
    shear: float | tuple[float, float] = 0.0
    fill: int | tuple[int, int, int] = 0
    border: str = "constant"
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("degrees", around("degrees", self.degrees, -360, 360, 0))
        self._set("translate", fractions("translate", self.translate))
        self._set("scale", interval("scale", self.scale, 0.05, 20))
        self._set("shear", around("shear", self.shear, -80, 80, 0))
        check_border(self)
        check_interpolation(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {
            "angle": between(rng, self.degrees),
            "shift": [between(rng, (-edge, edge)) for edge in self.translate],  # type: ignore[union-attr]
            "scale": between(rng, self.scale),
            "shear": between(rng, self.shear),
            **outside(self),
            **sampling(self),
        }


@dataclass(frozen=True, kw_only=True)
class Translate(_CentredWarp):
    """Shift by a fraction of the side drawn uniformly from [−a, a].

    fraction: the largest shift a, in [0, 1], one number or [vertical, horizontal].
    """

    former: ClassVar[Mapping[str, str]] = MappingProxyType({"share": "fraction"})
    fraction: float | tuple[float, float] = 0.1
    fill: int | tuple[int, int, int] = 0
    border: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("fraction", fractions("fraction", self.fraction))
        check_border(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"shift": [between(rng, (-edge, edge)) for edge in self.fraction], **outside(self)}  # type: ignore[union-attr]


@dataclass(frozen=True, kw_only=True)
class Shear(_CentredWarp):
    """Shear about the centre by angles drawn uniformly: `x` shifts rows, `y` shifts columns.

    x, y: degrees in [−80, 80]; one number a means [−a, a].
    """

    x: float | tuple[float, float] = 15.0
    y: float | tuple[float, float] = 0.0
    fill: int | tuple[int, int, int] = 0
    border: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("x", around("x", self.x, -80, 80, 0))
        self._set("y", around("y", self.y, -80, 80, 0))
        determinant_loss = math.tan(math.radians(max(map(abs, self.x)))) * math.tan(math.radians(max(map(abs, self.y))))  # type: ignore[arg-type]
        if determinant_loss >= 1:
            raise ValueError(f"x, y: {self.x} and {self.y} can collapse the image to a line; reduce x or y")
        check_border(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"shear": between(rng, self.x), "shear_y": between(rng, self.y), **outside(self)}


@dataclass(frozen=True, kw_only=True)
class Perspective(GeometricOp):
    """Move each corner inwards by a uniform fraction of half the side: a change of the viewpoint.

    distortion: the largest fraction, in [0, 1). As torchvision's RandomPerspective.
    """

    distortion: float = 0.3
    fill: int | tuple[int, int, int] = 0
    border: str = "constant"
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if number("distortion", self.distortion, 0, 1) == 1:
            raise ValueError("distortion: 1 lets two corners coincide; accepted: [0, 1)")
        check_border(self)
        check_interpolation(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"corners": (self.distortion / 2 * rng.random((4, 2))).tolist(), **outside(self), **sampling(self)}

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[Matrix, Size]:
        """args["corners"]: inward shifts of the corners, clockwise from the top left, as (x, y) fractions of the sides."""
        height, width = size
        tl, tr, br, bl = args["corners"]
        x0, y0 = tl[0] * width, tl[1] * height
        x1, y1 = (1 - tr[0]) * width, tr[1] * height
        x2, y2 = (1 - br[0]) * width, (1 - br[1]) * height
        x3, y3 = bl[0] * width, (1 - bl[1]) * height
        # From the unit square to the four corners (Heckbert 1989, "Fundamentals of texture mapping and image warping", section 2.2.3) …
        ax, ay, bx, by = x1 - x2, y1 - y2, x3 - x2, y3 - y2
        sx, sy = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
        cross = ax * by - ay * bx
        g, h = (sx * by - sy * bx) / cross, (ax * sy - ay * sx) / cross
        a, b, c = x1 - x0 + g * x1, x3 - x0 + h * x3, x0
        d, e, f = y1 - y0 + g * y1, y3 - y0 + h * y3, y0
        # … and back, by the adjugate, to the image.
        last = a * e - b * d
        u, v = width / last, height / last
        inverse = (
            (e - f * h) * u, (c * h - b) * u, (b * f - c * e) * u,
            (f * g - d) * v, (a - c * g) * v, (c * d - a * f) * v,
            (d * h - e * g) / last, (b * g - a * h) / last, 1.0,
        )  # fmt: skip
        return inverse, size


def fractions(name: str, value: Any) -> tuple[float, float]:
    """Check and return (vertical, horizontal), each in [0, 1]. One number means both."""
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: {value!r} is not a number or a pair [vertical, horizontal]")
    return number(name, pair[0], 0, 1), number(name, pair[1], 0, 1)


WARPS: Mapping[str, type[GeometricOp]] = MappingProxyType(
    {"Rotate": Rotate, "Shear": Shear, "Translate": Translate, "Affine": Affine, "Perspective": Perspective}
)
