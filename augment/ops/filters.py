"""Filter ops: they compute each pixel from its neighbourhood. The border is reflected about the last pixel."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg

from refract.augment.on_device import on_device
from refract.augment.ops.base import Args, Size, around, below, between, interval, whole
from refract.augment.ops.pixel import PixelOp, to_uint8

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class GaussianBlur(PixelOp):
    """Blur with a Gaussian kernel. Its radius is three standard deviations, rounded to whole pixels.

    sigma: standard deviation in pixels, in [0.05, 50], drawn uniformly.
    """

    sigma: float | tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("sigma", interval("sigma", self.sigma, 0.05, 50))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"sigma": between(rng, self.sigma)}

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        # sepFilter2D is twice as fast as OpenCV's GaussianBlur, which is bit-exact for uint8.
        radius = _radius(args["sigma"])
        kernel = cv2.getGaussianKernel(2 * radius + 1, args["sigma"], cv2.CV_32F)
        return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)

    @classmethod
    def on_batch(cls, args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        radius = max(_radius(a["sigma"]) for a in args)
        steps = np.arange(-radius, radius + 1)
        kernels = np.stack([_gauss(steps, a["sigma"]) for a in args])
        return to_uint8(_convolved(_convolved(images.float(), kernels[:, :, None]), kernels[:, None, :]))


LONGEST = 101
"""Longest motion blur in pixels."""


@dataclass(frozen=True, kw_only=True)
class MotionBlur(PixelOp):
    """Blur along a line, like a motion of the camera or the object.

    length: length of the line in pixels, in [1, 101], drawn uniformly. degrees: direction of the line, counter-clockwise from the x axis,
    drawn uniformly; one number a means [−a, a].
    """

    length: float | tuple[float, float] = (3.0, 11.0)
    degrees: float | tuple[float, float] = 180.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("length", interval("length", self.length, 1, LONGEST))
        self._set("degrees", around("degrees", self.degrees, -360, 360, 0))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"length": between(rng, self.length), "angle": between(rng, self.degrees)}

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        kernel = motion_kernel(args["length"], args["angle"])
        return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)

    @classmethod
    def on_batch(cls, args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        kernels = [motion_kernel(a["length"], a["angle"]) for a in args]
        height, width = (max(kernel.shape[axis] for kernel in kernels) for axis in (0, 1))
        padded = [
            np.pad(kernel, (((height - kernel.shape[0]) // 2,) * 2, ((width - kernel.shape[1]) // 2,) * 2))
            for kernel in kernels
        ]
        return to_uint8(_convolved(images.float(), np.stack(padded)))


@dataclass(frozen=True, kw_only=True)
class Sharpen(PixelOp):
    """Scale each value's difference from its smoothed neighbourhood by a factor drawn uniformly. As Pillow's Sharpness.

    factor: one number a means [max(0, 1 − a), 1 + a]; 1 changes nothing, 0 smooths. The outermost pixels are unchanged.
    """

    factor: float | tuple[float, float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("factor", around("factor", self.factor, 0, math.inf, 1))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"factor": between(rng, self.factor)}

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        if min(image.shape[:2]) <= 2:
            return image.copy()
        # The kernel is a weighted sum of the 3×3 box mean and the pixel: half the time of nine taps.
        kernel = _sharpening(args["factor"])
        mean = 9 * float(kernel[0, 0])
        result = cv2.addWeighted(image, 1 - mean, cv2.blur(image, (3, 3)), mean, 0)
        result[[0, -1]], result[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
        return result

    @classmethod
    def on_batch(cls, args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        result = images.clone()
        if min(images.shape[-2:]) > 2:
            kernels = np.stack([_sharpening(a["factor"]) for a in args])
            result[..., 1:-1, 1:-1] = to_uint8(_convolved(images.float(), kernels))[..., 1:-1, 1:-1]
        return result


@dataclass(frozen=True, kw_only=True)
class JPEGCompression(PixelOp):
    """Compress as JPEG (4:2:0 chroma subsampling) and decode.

    quality: in [1, 100], drawn uniformly among the whole numbers.
    """

    quality: int | tuple[int, int] = (30, 90)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = interval("quality", self.quality, 1, 100)
        self._set("quality", (whole("quality", low, 1), whole("quality", high, 1)))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        low, high = self.quality  # type: ignore[misc]
        return {"quality": low + below(rng, high - low + 1)}

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), args["quality"], "RGB", "420")
        return simplejpeg.decode_jpeg(data, "RGB")


@dataclass(frozen=True, kw_only=True)
class CLAHE(PixelOp):
    """Equalise the lightness per tile (contrast-limited adaptive histogram equalisation).

    clip_limit: largest slope of a tile's curve relative to the mean slope, in [0.01, 100], drawn uniformly. tiles: number of tiles along
    each side, at least 1.
    Source: Zuiderveld 1994, Graphics Gems IV, VIII.5; OpenCV's implementation on L of CIE L*a*b*.
    """

    clip_limit: float | tuple[float, float] = (1.0, 4.0)
    tiles: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("clip_limit", interval("clip_limit", self.clip_limit, 0.01, 100))
        self._set("tiles", whole("tiles", self.tiles, 1))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"clip_limit": between(rng, self.clip_limit), "tiles": self.tiles}

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        # Each tile needs at least one pixel.
        tiles = (max(1, min(args["tiles"], image.shape[1])), max(1, min(args["tiles"], image.shape[0])))
        lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
        lightness = cv2.extractChannel(lab, 0)
        cv2.createCLAHE(args["clip_limit"], tiles).apply(lightness, lightness)
        # In place: allocating a large array costs more than filling it.
        return cv2.cvtColor(cv2.insertChannel(lightness, lab, 0), cv2.COLOR_LAB2RGB, dst=lab)


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def _sharpening(factor: float) -> np.ndarray:
    """Return the 3×3 float32 kernel: factor · the pixel + (1 − factor) · its smoothed neighbourhood."""
    kernel = (1 - factor) * _SMOOTH
    kernel[1, 1] += factor
    return kernel.astype(np.float32)


def motion_kernel(length: float, angle: float) -> np.ndarray:
    """Return the kernel of a line through the centre, `length` pixels long at 0° and 90°: (h, w) float32, sum 1, both sides odd.

    Each column (each row, if the line is steep) has one non-zero entry, the pixel nearest to the line: the cost of a filter grows with the
    number of non-zero entries. ValueError if the length is outside 0 … `LONGEST`.
    """
    if not 0 <= length <= LONGEST:
        raise ValueError(f"length: {length!r} is not a number in [0, {LONGEST}]")
    cos, sin = math.cos(math.radians(angle)), -math.sin(math.radians(angle))
    steep = abs(sin) > abs(cos)
    major, minor = (sin, cos) if steep else (cos, sin)
    half = max(0.5, length / 2 * abs(major))
    reach = math.ceil(half - 0.5)
    slope = minor / major
    side = round(abs(reach * slope))
    kernel = np.zeros((2 * side + 1, 2 * reach + 1), np.float32)
    total = 2 * half
    for step in range(-reach, reach + 1):
        kernel[side + round(step * slope), reach + step] = min(1.0, half + 0.5 - abs(step)) / total
    return np.ascontiguousarray(kernel.T) if steep else kernel


def _radius(sigma: float) -> int:
    return max(1, round(3 * sigma))


def _gauss(steps: np.ndarray, sigma: float) -> np.ndarray:
    """Return Gaussian weights of sum 1, zero beyond three sigma, as in the CPU executor."""
    weights = np.exp(-0.5 * (steps / sigma) ** 2) * (np.abs(steps) <= _radius(sigma))
    return weights / weights.sum()


def _convolved(pixels: "torch.Tensor", kernels: np.ndarray) -> "torch.Tensor":
    """Convolve each sample with a separate kernel. pixels: float N×3×H×W; kernels: (N, h, w), h and w odd."""
    import torch.nn.functional as F

    count, channels, height, width = pixels.shape
    down, across = kernels.shape[1] // 2, kernels.shape[2] // 2
    pixels = pixels[:, :, _reflected_indices(height, down)][:, :, :, _reflected_indices(width, across)]
    weights = on_device(kernels, pixels.device, pixels.dtype).repeat_interleave(channels, 0).unsqueeze(1)
    flat = pixels.reshape(1, count * channels, *pixels.shape[2:])
    return F.conv2d(flat, weights, groups=count * channels).view(count, channels, height, width)


def _reflected_indices(side: int, margin: int) -> np.ndarray:
    """Return the indices −margin … side + margin − 1, reflected about the first and last pixel until they lie in the image."""
    if side == 1:
        return np.zeros(1 + 2 * margin, np.int64)
    indices = np.abs(np.arange(-margin, side + margin)) % (2 * side - 2)
    return np.minimum(indices, 2 * side - 2 - indices)


FILTERS: Mapping[str, type[PixelOp]] = MappingProxyType(
    {
        "GaussianBlur": GaussianBlur,
        "MotionBlur": MotionBlur,
        "Sharpen": Sharpen,
        "JPEGCompression": JPEGCompression,
        "CLAHE": CLAHE,
    }
)
