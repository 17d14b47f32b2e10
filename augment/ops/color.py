"""Ops that map each pixel's colour by a matrix. Consecutive ops fuse to one pass over the image."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from refract.augment.ops.base import Args, Op, Size, around, below, between, interval, number

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of R, G and B in the grey value: ITU-R BT.601."""


@dataclass(frozen=True, kw_only=True)
class ColorOp(Op):
    """An op that is one 4×4 matrix on (R, G, B, 1)."""

    kind: ClassVar[str] = "color"

    @staticmethod
    def needs_mean(args: Args) -> bool:
        """Whether `color` reads the mean colour."""
        return False

    @staticmethod
    def color(args: Args, mean: np.ndarray) -> np.ndarray:
        """Return the 4×4 float64 matrix of a drawn op on (R, G, B, 1), in grey levels. mean: (3,) mean colour of the input."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class _Factor(ColorOp):
    """factor: drawn uniformly from the pair; one number a means [max(0, 1 − a), 1 + a]; 1 changes nothing."""

    factor: float | tuple[float, float] = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("factor", around("factor", self.factor, 0, math.inf, 1))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"factor": between(rng, self.factor)}


@dataclass(frozen=True, kw_only=True)
class Brightness(_Factor):
    """Multiply all values by a factor drawn uniformly.

    factor: one number a means [max(0, 1 − a), 1 + a]; 1 changes nothing.
    """

    @staticmethod
    def color(args: Args, mean: np.ndarray) -> np.ndarray:
        return gains(args["factor"], args["factor"], args["factor"])


@dataclass(frozen=True, kw_only=True)
class Contrast(_Factor):
    """Scale the difference from the image's mean grey by a factor drawn uniformly. As torchvision's and Pillow's.

    factor: one number a means [max(0, 1 − a), 1 + a]; 1 changes nothing, 0 gives the mean grey.
    """

    @staticmethod
    def needs_mean(args: Args) -> bool:
        return True

    @staticmethod
    def color(args: Args, mean: np.ndarray) -> np.ndarray:
        factor = args["factor"]
        matrix = gains(factor, factor, factor)
        matrix[:3, 3] = (1 - factor) * (LUMA @ mean)
        return matrix


@dataclass(frozen=True, kw_only=True)
class Saturation(_Factor):
    """Scale each colour's difference from its grey value by a factor drawn uniformly.

    factor: one number a means [max(0, 1 − a), 1 + a]; 1 changes nothing, 0 gives a grey image.
    """

    @staticmethod
    def color(args: Args, mean: np.ndarray) -> np.ndarray:
        factor = args["factor"]
        matrix = gains(factor, factor, factor)
        matrix[:3, :3] += (1 - factor) * LUMA
        return matrix


@dataclass(frozen=True, kw_only=True)
class Hue(ColorOp):
    """Rotate the hue by a fraction of the colour circle drawn uniformly. Positive values rotate red towards green.

    turns: in [−0.5, 0.5]; one number a means [−a, a]. The op rotates about the grey axis, which keeps the mean of R, G and B. With
    `exact: true` in the policy it rotates in HSV, which keeps their maximum and minimum.
    """

    turns: float | tuple[float, float] = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("turns", around("turns", self.turns, -0.5, 0.5, 0))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"turns": between(rng, self.turns)}

    @staticmethod
    def color(args: Args, mean: np.ndarray) -> np.ndarray:
        # Rodrigues' formula for a rotation about (1, 1, 1).
        angle = 2 * math.pi * args["turns"]
        cos, sin = math.cos(angle), math.sin(angle) / math.sqrt(3)
        rest = (1 - cos) / 3
        a, b, c = cos + rest, rest - sin, rest + sin
        return np.array([[a, b, c, 0], [c, a, b, 0], [b, c, a, 0], [0, 0, 0, 1.0]])


_JITTER: dict[str, tuple[type[ColorOp], str, float]] = {
    "brightness": (Brightness, "factor", 1.0),
    "contrast": (Contrast, "factor", 1.0),
    "saturation": (Saturation, "factor", 1.0),
    "hue": (Hue, "turns", 0.0),
}


@dataclass(frozen=True, kw_only=True)
class ColorJitter(ColorOp):
    """Change brightness, contrast, saturation and hue, in a random order.

    brightness, contrast, saturation: factors; one number a means [max(0, 1 − a), 1 + a]. hue: fraction of the colour circle, in
    [−0.5, 0.5]; one number a means [−a, a]. All drawn uniformly. Contrast is about the image's mean grey, as torchvision's.
    Source: Krizhevsky et al. 2012 (the idea); torchvision's ColorJitter (the parameters). Deviations: one matrix, so values
    are not clipped between the four; hue as in `Hue`.
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
        remaining = [(name, between(rng, getattr(self, name)), neutral) for name, (_, _, neutral) in _JITTER.items()]
        amounts = {}
        while remaining:
            name, amount, neutral = remaining.pop(below(rng, len(remaining)))
            if amount != neutral:
                amounts[name] = amount
        return amounts

    @staticmethod
    def needs_mean(args: Args) -> bool:
        return "contrast" in args

    @staticmethod
    def color(args: Args, mean: np.ndarray) -> np.ndarray:
        total = np.eye(4)
        for name, amount in args.items():
            op, parameter, _ = _JITTER[name]
            current_mean = total[:3, :3] @ mean + total[:3, 3] if name == "contrast" else mean
            total = op.color({parameter: amount}, current_mean) @ total
        return total

    @staticmethod
    def parts(args: Args) -> list[tuple[str, Args]]:
        """Return the single ops of a drawn jitter in order, as (name, args)."""
        return [(_JITTER[name][0].__name__, {_JITTER[name][1]: amount}) for name, amount in args.items()]


@dataclass(frozen=True, kw_only=True)
class Grayscale(ColorOp):
    """Replace each colour by its grey value (ITU-R BT.601), in three equal channels."""

    p: float = 0.1

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {}

    @staticmethod
    def color(args: Args, mean: np.ndarray) -> np.ndarray:
        matrix = np.zeros((4, 4))
        matrix[:3, :3], matrix[3, 3] = LUMA, 1
        return matrix


@dataclass(frozen=True, kw_only=True)
class ChannelShuffle(ColorOp):
    """Permute the three channels; the order is drawn uniformly from all six. Exact."""

    p: float = 0.1

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"order": rng.permutation(3).tolist()}

    @staticmethod
    def color(args: Args, mean: np.ndarray) -> np.ndarray:
        return np.eye(4)[[*args["order"], 3]]


@dataclass(frozen=True, kw_only=True)
class RGBShift(ColorOp):
    """Add a separate number of grey levels, drawn uniformly, to each channel.

    levels: in [−255, 255]; one number a means [−a, a].
    """

    levels: float | tuple[float, float] = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("levels", around("levels", self.levels, -255, 255, 0))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"levels": [between(rng, self.levels) for _ in range(3)]}

    @staticmethod
    def color(args: Args, mean: np.ndarray) -> np.ndarray:
        return shifts(*args["levels"])


# Eigenvectors (columns) and eigenvalues of the RGB covariance over ImageNet, for values in 0…1, as published with the Torch port.
_IMAGENET_VECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
_IMAGENET_VALUES = np.array([0.2175, 0.0188, 0.0045])


@dataclass(frozen=True, kw_only=True)
class PCALighting(ColorOp):
    """Add each principal component of ImageNet's colours, scaled by a normal number times the component's eigenvalue.

    sigma: standard deviation of the normal numbers, at least 0; 0.1 in the paper.
    Source: Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks", section 4.1.
    """

    sigma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("sigma", number("sigma", self.sigma, 0, 100))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"alpha": (self.sigma * rng.standard_normal(3)).tolist()}

    @staticmethod
    def color(args: Args, mean: np.ndarray) -> np.ndarray:
        return shifts(*(255 * _IMAGENET_VECTORS @ (np.array(args["alpha"]) * _IMAGENET_VALUES)).tolist())


@dataclass(frozen=True, kw_only=True)
class ColorTemperature(ColorOp):
    """Change the colour temperature of the light, assuming 6500 K for the input. Keeps the brightness of white.

    kelvin: in [2000, 20000], drawn uniformly in its reciprocal, which is closer to perceptually even steps. Low is orange, high is blue.
    Source: the black body's chromaticity after Kang et al. 2002, "Design of advanced color temperature control system for HDTV
    applications", J. Korean Physical Society 41(6), equations 7 to 9. Gains are applied to the gamma-coded values.
    """

    kelvin: float | tuple[float, float] = (3500.0, 12000.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("kelvin", interval("kelvin", self.kelvin, 2000, 20000))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        low, high = self.kelvin  # type: ignore[misc]
        return {"kelvin": 1 / between(rng, (1 / high, 1 / low))}

    @staticmethod
    def color(args: Args, mean: np.ndarray) -> np.ndarray:
        gain = _black_body(args["kelvin"]) / _black_body(6500.0)
        gain = np.clip(gain, 0, None) ** (1 / 2.2)
        return gains(*(gain / (LUMA @ gain)).tolist())


def _black_body(kelvin: float) -> np.ndarray:
    """Return the linear sRGB colour, shape (3,), of a black body of luminance 1."""
    t = 1e3 / kelvin
    if kelvin <= 4000:
        x = -0.2661239 * t**3 - 0.2343589 * t**2 + 0.8776956 * t + 0.179910
    else:
        x = -3.0258469 * t**3 + 2.1070379 * t**2 + 0.2226347 * t + 0.240390
    if kelvin <= 2222:
        y = -1.1063814 * x**3 - 1.34811020 * x**2 + 2.18555832 * x - 0.20219683
    elif kelvin <= 4000:
        y = -0.9549476 * x**3 - 1.37418593 * x**2 + 2.09137015 * x - 0.16748867
    else:
        y = 3.0817580 * x**3 - 5.87338670 * x**2 + 3.75112997 * x - 0.37001483
    xyz = np.array([x / y, 1.0, (1 - x - y) / y])
    to_rgb = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
    return to_rgb @ xyz


def gains(red: float, green: float, blue: float) -> np.ndarray:
    """Return the 4×4 matrix that multiplies each channel."""
    return np.array([[red, 0, 0, 0], [0, green, 0, 0], [0, 0, blue, 0], [0, 0, 0, 1.0]])


def shifts(red: float, green: float, blue: float) -> np.ndarray:
    """Return the 4×4 matrix that adds grey levels to each channel."""
    return np.array([[1, 0, 0, red], [0, 1, 0, green], [0, 0, 1, blue], [0, 0, 0, 1.0]])


COLOR: Mapping[str, type[ColorOp]] = MappingProxyType(
    {
        "Brightness": Brightness,
        "Contrast": Contrast,
        "Saturation": Saturation,
        "Hue": Hue,
        "ColorJitter": ColorJitter,
        "Grayscale": Grayscale,
        "ChannelShuffle": ChannelShuffle,
        "RGBShift": RGBShift,
        "PCALighting": PCALighting,
        "ColorTemperature": ColorTemperature,
    }
)
