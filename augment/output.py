"""Output formats of the CPU executor: uint8 H×W×C, uint8 C×H×W, or normalised float32 C×H×W."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np

from refract.augment.executors import cpu
from refract.augment.ops.base import nearest
from refract.augment.preprocess import IMAGENET_MEAN, IMAGENET_STD

Numbers = float | Sequence[float]


@dataclass(frozen=True)
class OutputFormat:
    """Convert a uint8 H×W×3 image to the array that a training loop expects.

    kind: a key of `KINDS`. channels: 3 for RGB, 1 for luma (ITU-R BT.601).
    mean, std: per channel, in 0…1, for `float32` only. The result is (x / 255 − mean) / std within float32 rounding. None takes ImageNet's
    for 3 channels. ValueError names a bad value.
    """

    kind: str = "uint8"
    channels: int = 3
    mean: Numbers | None = None
    std: Numbers | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"output: {self.kind!r} is not one of {', '.join(KINDS)}{nearest(self.kind, KINDS)}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels: {self.channels!r} is neither 3 (RGB) nor 1 (luma)")
        if self.kind != "float32":
            if self.mean is not None or self.std is not None:
                raise ValueError(f"mean, std: output {self.kind!r} is not normalised; pass output='float32'")
            return
        if self.channels == 1 and (self.mean is None or self.std is None):
            raise ValueError(
                "mean, std: channels=1 has no default; pass one number for each, such as mean=0.5, std=0.5"
            )
        mean = self._channels("mean", IMAGENET_MEAN if self.mean is None else self.mean)
        std = self._channels("std", IMAGENET_STD if self.std is None else self.std)
        if min(std) <= 0:
            raise ValueError(f"std: {self.std!r} is not positive")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)
        object.__setattr__(self, "_gains", tuple(1 / (255 * s) for s in std))
        object.__setattr__(self, "_offsets", tuple(-m / s for m, s in zip(mean, std, strict=True)))

    def _channels(self, name: str, value: Numbers) -> tuple[float, ...]:
        numbers = np.asarray(value, dtype=np.float64).ravel()
        if numbers.size not in (1, self.channels) or not np.isfinite(numbers).all():
            raise ValueError(f"{name}: {value!r} is neither one finite number nor {self.channels} of them")
        return tuple(np.broadcast_to(numbers, self.channels).tolist())

    @property
    def dtype(self) -> type[np.generic]:
        return np.float32 if self.kind == "float32" else np.uint8

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return the shape of the result for an image of `size` (height, width)."""
        return (*size, self.channels) if self.kind == "uint8" else (self.channels, *size)

    def __call__(self, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return the converted image, C-contiguous. image: uint8 H×W×3, not changed.

        out: an array that receives the result, such as one sample of a batch. ValueError if its dtype, shape or layout does not fit.
        """
        if out is None and self.kind == "uint8" and self.channels == 3:
            return image
        shape = self.shape(image.shape[:2])
        if out is None:
            out = np.empty(shape, self.dtype)
        elif out.dtype != self.dtype or out.shape != shape or not out.flags.c_contiguous:
            raise ValueError(
                f"out: {out.dtype} {'×'.join(map(str, out.shape))} does not fit; the result is a contiguous "
                f"{np.dtype(self.dtype)} {'×'.join(map(str, shape))}"
            )
        planes = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[None] if self.channels == 1 else cpu.planes(image)
        if self.kind == "float32":
            self._normalise(planes, out)
        elif self.kind == "uint8_chw":
            out[...] = planes
        else:
            out[...] = planes[0][..., None] if self.channels == 1 else image
        return out

    def _normalise(self, planes: np.ndarray, out: np.ndarray) -> None:
        """Write gain · x + offset to each plane of `out`. Takes a fifth of the time of a transposition and three NumPy passes."""
        gains: tuple[float, ...] = self._gains  # type: ignore[attr-defined]
        offsets: tuple[float, ...] = self._offsets  # type: ignore[attr-defined]
        for plane, result, gain, offset in zip(planes, out, gains, offsets, strict=True):
            if gain < 0.5:
                # OpenCV's running average, (1 − gain) · result + gain · plane, is its fastest pass from uint8 to scaled float32.
                result.fill(offset / (1 - gain))
                cv2.accumulateWeighted(plane, result, gain)
            else:  # for 1 − gain near 0 or negative, the running average loses precision
                cv2.addWeighted(plane, gain, plane, 0, offset, result, cv2.CV_32F)


KINDS: Mapping[str, str] = MappingProxyType(
    {
        "uint8": "uint8 H×W×C, grey levels",
        "uint8_chw": "uint8 C×H×W, grey levels",
        "float32": "float32 C×H×W, normalised by mean and std",
    }
)
