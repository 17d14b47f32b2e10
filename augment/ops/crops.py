"""Geometric ops that crop, pad and resize: each resamples a box of the input to an output size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from refract.augment.ops.base import Args, Size, below, between, interval, pixels, whole
from refract.augment.ops.geometric import (
    GeometricOp,
    Matrix,
    check_border,
    check_interpolation,
    matrix,
    outside,
    random_offset,
    sampling,
)


@dataclass(frozen=True, kw_only=True)
class _Crop(GeometricOp):
    """Resample the box (top, left, height, width) of the input to `size`. The box may extend beyond the input."""

    @staticmethod
    def geometry(args: Args, size: Size) -> tuple[Matrix, Size]:
        top, left, height, width = args["box"]
        out_height, out_width = args["size"]
        return matrix(width / out_width, 0.0, left, 0.0, height / out_height, top), (out_height, out_width)

    @staticmethod
    def output_size(args: Args, size: Size) -> Size:
        return args["size"][0], args["size"][1]


@dataclass(frozen=True, kw_only=True)
class RandomCrop(_Crop):
    """Crop `size` (pixels, or [height, width]) at a uniform position. A smaller image gets a uniform position on `fill`. Exact."""

    size: int | tuple[int, int]
    fill: int | tuple[int, int, int] = 0
    border: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("size", pixels("size", self.size))
        check_border(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        height, width = self.size  # type: ignore[misc]
        top, left = random_offset(rng, size[0] - height), random_offset(rng, size[1] - width)
        return {"box": [top, left, height, width], "size": [height, width], **outside(self)}


@dataclass(frozen=True, kw_only=True)
class PadAndCrop(_Crop):
    """Pad by `padding` pixels on every side, then crop to the original size at a uniform position: the CIFAR shift. Exact.

    Source: He et al. 2016, "Deep residual learning", section 4.2 (padding 4).
    """

    padding: int = 4
    fill: int | tuple[int, int, int] = 0
    border: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("padding", whole("padding", self.padding, 0))
        check_border(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        top, left = (below(rng, 2 * self.padding + 1) - self.padding for _ in range(2))
        return {"box": [top, left, *size], "size": list(size), **outside(self)}


@dataclass(frozen=True, kw_only=True)
class Resize(_Crop):
    """Resample to `size` (pixels, or [height, width]). The aspect ratio may change.

    interpolation: `bilinear` or `bicubic`.
    """

    size: int | tuple[int, int]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("size", pixels("size", self.size))
        check_interpolation(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"box": [0, 0, *size], "size": list(self.size), **sampling(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop(_Crop):
    """Crop a box of random area and aspect ratio, and resample it to `size`.

    scale: fraction of the image's area, in (0, 1]; drawn uniformly. ratio: width / height; drawn uniformly in its logarithm.
    interpolation: `bilinear` or `bicubic`.
    After ten draws that do not fit, the op crops the largest centred box of a permitted ratio, as torchvision does.
    Source: Szegedy et al. 2015, "Going deeper with convolutions", section 6.
    """

    size: int | tuple[int, int] = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("size", pixels("size", self.size))
        self._set("scale", interval("scale", self.scale, 1e-4, 1))
        self._set("ratio", interval("ratio", self.ratio, 1e-2, 1e2))
        check_interpolation(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        height, width = size
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = height * width * between(rng, self.scale)
            ratio = math.exp(low + (high - low) * rng.random())
            box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < box_height <= height and 0 < box_width <= width:
                box = [
                    random_offset(rng, height - box_height),
                    random_offset(rng, width - box_width),
                    box_height,
                    box_width,
                ]
                break
        else:
            ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
            box_height = min(height, max(1, round(width / ratio)))
            box_width = min(width, max(1, round(height * ratio)))
            box = [(height - box_height) // 2, (width - box_width) // 2, box_height, box_width]
        return {"box": box, "size": list(self.size), **sampling(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class RandomScale(_Crop):
    """Scale both sides by one factor drawn uniformly from `scale`, in [0.05, 20]. The output size changes with the factor."""

    scale: tuple[float, float] = (0.8, 1.25)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("scale", interval("scale", self.scale, 0.05, 20))
        check_interpolation(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        factor = between(rng, self.scale)
        return {"box": [0, 0, *size], "size": [max(1, round(side * factor)) for side in size], **sampling(self)}


@dataclass(frozen=True, kw_only=True)
class CenterCrop(_Crop):
    """Crop `size` (pixels, or [height, width]) from the centre. A smaller image is centred on `fill`. Exact."""

    size: int | tuple[int, int]
    fill: int | tuple[int, int, int] = 0
    border: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("size", pixels("size", self.size))
        check_border(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        height, width = self.size  # type: ignore[misc]
        box = [(size[0] - height) // 2, (size[1] - width) // 2, height, width]
        return {"box": box, "size": [height, width], **outside(self)}


@dataclass(frozen=True, kw_only=True)
class Pad(_Crop):
    """Pad height and width to at least `size` (pixels, or [height, width]), with the image centred. Exact."""

    size: int | tuple[int, int]
    fill: int | tuple[int, int, int] = 0
    border: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("size", pixels("size", self.size))
        check_border(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args | None:
        height, width = (max(side, least) for side, least in zip(size, pixels("size", self.size), strict=True))
        if (height, width) == tuple(size):
            return None
        box = [(size[0] - height) // 2, (size[1] - width) // 2, height, width]
        return {"box": box, "size": [height, width], **outside(self)}


@dataclass(frozen=True, kw_only=True)
class ShortestSide(_Crop):
    """Resample so that the shorter side has `size` pixels. Keeps the aspect ratio, within rounding."""

    size: int
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("size", pixels("size", whole("size", self.size, 1))[0])
        check_interpolation(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        factor = self.size / min(size)
        return {"box": [0, 0, *size], "size": [max(1, round(side * factor)) for side in size], **sampling(self)}


@dataclass(frozen=True, kw_only=True)
class LongestSide(_Crop):
    """Resample so that the longer side has `size` pixels. Keeps the aspect ratio, within rounding."""

    size: int
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("size", pixels("size", whole("size", self.size, 1))[0])
        check_interpolation(self)

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        factor = self.size / max(size)
        return {"box": [0, 0, *size], "size": [max(1, round(side * factor)) for side in size], **sampling(self)}


CROPS: Mapping[str, type[GeometricOp]] = MappingProxyType(
    {
        "CenterCrop": CenterCrop,
        "RandomCrop": RandomCrop,
        "PadAndCrop": PadAndCrop,
        "Pad": Pad,
        "Resize": Resize,
        "ShortestSide": ShortestSide,
        "LongestSide": LongestSide,
        "RandomResizedCrop": RandomResizedCrop,
        "RandomScale": RandomScale,
    }
)
