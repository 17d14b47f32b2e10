"""Noise ops: they change every pixel by an independent random number.

The numbers are consecutive entries of one fixed table from a drawn offset (`refract.augment.random`). Both executors read the same noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import cv2
import numpy as np

from refract.augment.on_device import on_device
from refract.augment.ops.base import Args, Size, below, between, color, interval
from refract.augment.ops.pixel import PixelOp, batch_stretch, column, to_uint8
from refract.augment.random import TABLE_SIZE, laplace_table, normal_table, stretch, uniform_table

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class _SigmaNoise(PixelOp):
    """sigma: fraction of the full range (0.1 is 25.5 grey levels), in [0, 1], drawn uniformly from the pair.

    per_channel: whether red, green and blue have separate noise; if false, they share it and a grey image stays grey.
    """

    sigma: float | tuple[float, float] = (0.0, 0.1)
    per_channel: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("sigma", interval("sigma", self.sigma, 0, 1))
        if not isinstance(self.per_channel, bool):
            raise ValueError(f"per_channel: {self.per_channel!r} is neither true nor false")

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        args = {"sigma": between(rng, self.sigma), "offset": below(rng, TABLE_SIZE)}
        return args if self.per_channel else {**args, "per_channel": False}


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(_SigmaNoise):
    """Add independent normal noise to every value.

    sigma: standard deviation as a fraction of the full range (0.1 is 25.5 grey levels), in [0, 1], drawn uniformly from the pair.
    per_channel: whether each channel has separate noise; if false, a grey image stays grey.
    """

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        return _added(image, _noise(normal_table(), args, image), args["sigma"])

    @classmethod
    def on_batch(cls, args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        return to_uint8(
            images + column(images, [255 * a["sigma"] for a in args]) * _batch_noise(normal_table(), args, images)
        )


@dataclass(frozen=True, kw_only=True)
class LaplaceNoise(_SigmaNoise):
    """Add independent Laplace noise to every value: the variance of normal noise of this sigma, with heavier tails.

    sigma: standard deviation (√2 times the distribution's scale) as a fraction of the full range, in [0, 1], drawn uniformly.
    per_channel: whether each channel has separate noise; if false, a grey image stays grey.
    """

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        return _added(image, _noise(laplace_table(), args, image), args["sigma"])

    @classmethod
    def on_batch(cls, args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        return to_uint8(
            images + column(images, [255 * a["sigma"] for a in args]) * _batch_noise(laplace_table(), args, images)
        )


@dataclass(frozen=True, kw_only=True)
class SpeckleNoise(_SigmaNoise):
    """Multiply every value by 1 + normal noise: bright pixels change most, black pixels not at all.

    sigma: standard deviation of the factor, in [0, 1], drawn uniformly.
    per_channel: whether each channel has separate noise; if false, a grey image stays grey.
    """

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        noise = _noise(normal_table(), args, image)
        product = cv2.multiply(image, noise, scale=args["sigma"], dtype=cv2.CV_32F)
        return cv2.add(image, product, dtype=cv2.CV_8U)

    @classmethod
    def on_batch(cls, args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        noise = _batch_noise(normal_table(), args, images)
        return to_uint8(images + images * noise * column(images, [a["sigma"] for a in args]))


@dataclass(frozen=True, kw_only=True)
class PoissonNoise(PixelOp):
    """Add shot noise: the variance of each value's noise is proportional to the value.

    photons: number of photons of a value of 255, at least 1, drawn uniformly in its logarithm; fewer photons mean more noise.
    Deviation: normal numbers with the Poisson distribution's mean and variance; above about ten photons the difference is not visible.
    """

    photons: float | tuple[float, float] = (30.0, 300.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("photons", interval("photons", self.photons, 1, 1e6))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        low, high = np.log(self.photons)
        return {"photons": float(np.exp(between(rng, (low, high)))), "offset": below(rng, TABLE_SIZE)}

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        noise = _noise(normal_table(), args, image)
        deviation = cv2.LUT(image, np.sqrt(np.arange(256, dtype=np.float32) * np.float32(255 / args["photons"])))
        return cv2.add(image, cv2.multiply(deviation, noise), dtype=cv2.CV_8U)

    @classmethod
    def on_batch(cls, args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        deviation = (images * column(images, [255 / a["photons"] for a in args])).sqrt_()
        return to_uint8(images + deviation * _batch_noise(normal_table(), args, images))


@dataclass(frozen=True, kw_only=True)
class SaltAndPepper(PixelOp):
    """Set a fraction of the pixels to black or white, each equally likely.

    amount: the fraction, in [0, 1], drawn uniformly; resolution 1/128.
    """

    amount: float | tuple[float, float] = (0.0, 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("amount", interval("amount", self.amount, 0, 1))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {"amount": between(rng, self.amount), "offset": below(rng, TABLE_SIZE)}

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        draws, half = _pixel_draws(args["offset"], image), round(128 * args["amount"])
        result = image.copy()
        result[draws < half] = 0
        result[draws >= 256 - half] = 255
        return result

    @classmethod
    def on_batch(cls, args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        draws, half = _batch_pixel_draws(args, images), column(images, [round(128 * a["amount"]) for a in args])
        return images.masked_fill(draws < half, 0).masked_fill(draws >= 256 - half, 255)


@dataclass(frozen=True, kw_only=True)
class PixelDropout(PixelOp):
    """Replace a fraction of the pixels by one colour.

    amount: the fraction, in [0, 1], drawn uniformly; resolution 1/256. fill: grey level or RGB in 0…255.
    """

    amount: float | tuple[float, float] = (0.0, 0.1)
    fill: int | tuple[int, int, int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("amount", interval("amount", self.amount, 0, 1))
        self._set("fill", color("fill", self.fill))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        amount = between(rng, self.amount)
        return {"amount": amount, "offset": below(rng, TABLE_SIZE), "fill": list(self.fill)}  # type: ignore[arg-type]

    @staticmethod
    def on_image(args: Args, image: np.ndarray) -> np.ndarray:
        result = image.copy()
        result[_pixel_draws(args["offset"], image) < round(256 * args["amount"])] = args["fill"]
        return result

    @classmethod
    def on_batch(cls, args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
        import torch

        dropped = _batch_pixel_draws(args, images) < column(images, [round(256 * a["amount"]) for a in args])
        fill = on_device([a["fill"] for a in args], images.device, images.dtype).view(-1, 3, 1, 1)
        return torch.where(dropped, fill, images)


def _added(image: np.ndarray, noise: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.addWeighted(image, 1.0, noise, 255 * sigma, 0.0, dtype=cv2.CV_8U)


def _noise(table: np.ndarray, args: Args, image: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) numbers of the table."""
    if args.get("per_channel", True):
        return stretch(table, args["offset"], image.size).reshape(image.shape)
    height, width, channels = image.shape
    return cv2.merge([stretch(table, args["offset"], height * width).reshape(height, width)] * channels)


def _batch_noise(table: np.ndarray, args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
    """Return (N, 3, H, W) numbers of the table, equal to `_noise` for each sample."""
    import torch

    count, channels, height, width = images.shape
    noise = batch_stretch(table, [a["offset"] for a in args], images, channels * height * width)
    result = noise.view(count, height, width, channels).permute(0, 3, 1, 2)
    separate = [a.get("per_channel", True) for a in args]
    if all(separate):
        return result
    shared = noise[:, : height * width].view(count, 1, height, width)
    return torch.where(on_device(separate, images.device).view(-1, 1, 1, 1), result, shared)


def _pixel_draws(offset: int, image: np.ndarray) -> np.ndarray:
    """Return (H, W) uniform uint8 draws."""
    return stretch(uniform_table(), offset, image.shape[0] * image.shape[1]).reshape(image.shape[:2])


def _batch_pixel_draws(args: Sequence[Args], images: "torch.Tensor") -> "torch.Tensor":
    """Return the same draws for a batch: (N, 1, H, W) int16, so that they compare with 256."""
    import torch

    count, _, height, width = images.shape
    draws = batch_stretch(uniform_table(), [a["offset"] for a in args], images, height * width)
    return draws.view(count, 1, height, width).to(torch.int16)


NOISE: Mapping[str, type[PixelOp]] = MappingProxyType(
    {
        "GaussianNoise": GaussianNoise,
        "LaplaceNoise": LaplaceNoise,
        "PoissonNoise": PoissonNoise,
        "SpeckleNoise": SpeckleNoise,
        "SaltAndPepper": SaltAndPepper,
        "PixelDropout": PixelDropout,
    }
)
