"""Ops that map each pixel's colour by a 3×4 matrix, so that neighbours fuse to one pass."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from augment.ops.op import Args, Op, Size, around

LUMA = np.array([0.299, 0.587, 0.114])
"""The grey of an RGB colour: ITU-R BT.601."""


@dataclass(frozen=True, kw_only=True)
class ColorOp(Op):
    kind: ClassVar[str] = "color"

    @staticmethod
    def color(args: Args, mean: np.ndarray) -> np.ndarray:
        """The 3×4 float64 matrix on (R, G, B, 1), in grey levels, of a drawn op. mean: (3,) the input's mean colour, in grey levels."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ColorJitter(ColorOp):
    """Change brightness, contrast, saturation and hue, in a drawn order.

    brightness, contrast, saturation: factors; one number a means [max(0, 1 − a), 1 + a]. hue: turns of the colour circle, in
    [−0.5, 0.5]; one number a means [−a, a]. All drawn uniformly. Contrast is about the picture's mean grey, as torchvision's.
    Source: Krizhevsky et al. 2012 (the idea); torchvision's ColorJitter (the parameters). Deviations: one matrix, so nothing is
    clipped between the four; hue is a rotation about the grey axis, which keeps the mean of R, G and B, not one in HSV, which keeps their
    maximum and minimum.
    """

    brightness: float | tuple[float, float] = 0.0
    contrast: float | tuple[float, float] = 0.0
    saturation: float | tuple[float, float] = 0.0
    hue: float | tuple[float, float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("brightness", "contrast", "saturation"):
            self._set(name, around(name, getattr(self, name), 0, math.inf, 1))
        self._set("hue", around("hue", self.hue, -0.5, 0.5, 0))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        names = ("brightness", "contrast", "saturation", "hue")
        drawn = [(name, float(rng.uniform(*getattr(self, name)))) for name in names]
        neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
        return {drawn[i][0]: drawn[i][1] for i in rng.permutation(4) if drawn[i][1] != neutral[drawn[i][0]]}

    @staticmethod
    def color(args: Args, mean: np.ndarray) -> np.ndarray:
        total = np.hstack([np.eye(3), np.zeros((3, 1))])
        for name, amount in args.items():
            if name == "brightness":
                total *= amount
            elif name == "contrast":
                grey = LUMA @ (total[:, :3] @ mean + total[:, 3])
                total *= amount
                total[:, 3] += (1 - amount) * grey
            elif name == "saturation":
                total = (amount * np.eye(3) + (1 - amount) * LUMA) @ total
            else:
                total = _hue_rotation(amount) @ total
        return total


def _hue_rotation(turns: float) -> np.ndarray:
    """3×3: a turn about the grey axis R = G = B, red towards green (Rodrigues' formula)."""
    cos, sin = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns) / math.sqrt(3)
    return cos * np.eye(3) + (1 - cos) / 3 + sin * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])


COLOR: Mapping[str, type[ColorOp]] = MappingProxyType({"ColorJitter": ColorJitter})
