"""Ops that map each channel's values by a table of 256 entries. Consecutive ops fuse to one look-up.

A table maps uint8 to uint8, so a fused chain equals its ops applied one by one. A table that depends on the image is computed from the
image's histogram. The histogram after a table follows from the histogram before it, so a chain counts the pixels once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from refract.augment.ops.base import Args, Op, Size, below, interval, whole

LEVELS = np.arange(256)
_UNIT_LEVELS = LEVELS / 255


@dataclass(frozen=True, kw_only=True)
class ToneOp(Op):
    """An op that is one table per channel, uint8 to uint8."""

    kind: ClassVar[str] = "color"
    needs_histogram: ClassVar[bool] = False

    @staticmethod
    def table(args: Args, histogram: np.ndarray) -> np.ndarray:
        """Return the new value of each value for R, G and B: (3, 256) uint8.

        histogram: (3, 256), the pixel count of each value; all zeros if no op of the chain needs it.
        A table shared by the channels should be an `np.broadcast_to` view: the executors detect it and use one look-up.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Gamma(ToneOp):
    """Raise each value, scaled to 0…1, to a power drawn uniformly in its logarithm.

    gamma: the power, in [0.1, 10]; below 1 brightens, above 1 darkens. One number means that fixed power.
    """

    gamma: float | tuple[float, float] = (0.7, 1.4)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("gamma", interval("gamma", self.gamma, 0.1, 10))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        low, high = self.gamma  # type: ignore[misc]
        return {"gamma": low * math.exp(math.log(high / low) * rng.random())}

    @staticmethod
    def table(args: Args, histogram: np.ndarray) -> np.ndarray:
        return _shared(np.rint(255 * _UNIT_LEVELS ** args["gamma"]))


@dataclass(frozen=True, kw_only=True)
class Invert(ToneOp):
    """Replace each value v by 255 − v. Exact."""

    p: float = 0.1

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {}

    @staticmethod
    def table(args: Args, histogram: np.ndarray) -> np.ndarray:
        return _solarized(0)


@dataclass(frozen=True, kw_only=True)
class Solarize(ToneOp):
    """Invert all values at or above a threshold. As Pillow's.

    threshold: grey level in [0, 256], drawn uniformly among the whole numbers; 256 inverts nothing, 0 everything.
    """

    threshold: int | tuple[int, int] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("threshold", interval("threshold", self.threshold, 0, 256))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        low, high = self.threshold  # type: ignore[misc]
        return {"threshold": round(low) + below(rng, round(high) - round(low) + 1)}

    @staticmethod
    def table(args: Args, histogram: np.ndarray) -> np.ndarray:
        return _solarized(args["threshold"])


@dataclass(frozen=True, kw_only=True)
class Posterize(ToneOp):
    """Keep the highest bits of each value and clear the others. As Pillow's.

    bits: number of bits to keep, in [1, 8], drawn uniformly among the whole numbers; 8 changes nothing.
    """

    bits: int | tuple[int, int] = (4, 7)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = interval("bits", self.bits, 1, 8)
        self._set("bits", (whole("bits", low, 1), whole("bits", high, 1)))

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        low, high = self.bits  # type: ignore[misc]
        return {"bits": low + below(rng, high - low + 1)}

    @staticmethod
    def table(args: Args, histogram: np.ndarray) -> np.ndarray:
        return _posterized(args["bits"])


@dataclass(frozen=True, kw_only=True)
class AutoContrast(ToneOp):
    """Stretch each channel so that its lowest value becomes 0 and its highest 255. As Pillow's; a channel of one value is unchanged."""

    needs_histogram: ClassVar[bool] = True

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {}

    @staticmethod
    def table(args: Args, histogram: np.ndarray) -> np.ndarray:
        tables = np.empty((3, 256), np.uint8)
        for channel, counts in enumerate(histogram):
            present = np.flatnonzero(counts)
            low, high = (present[0], present[-1]) if present.size else (0, 0)
            scale = 255 / (high - low) if high > low else 1.0
            offset = -low * scale if high > low else 0.0
            tables[channel] = np.clip(
                LEVELS * scale + offset, 0, 255
            )  # the cast truncates to whole levels, as Pillow does
        return tables


@dataclass(frozen=True, kw_only=True)
class Equalize(ToneOp):
    """Equalise each channel's histogram. As Pillow's; a channel of one value is unchanged."""

    needs_histogram: ClassVar[bool] = True

    def draw(self, rng: np.random.Generator, size: Size) -> Args:
        return {}

    @staticmethod
    def table(args: Args, histogram: np.ndarray) -> np.ndarray:
        tables = np.empty((3, 256), np.uint8)
        for channel, counts in enumerate(histogram):
            present = np.flatnonzero(counts)
            step = int(counts.sum() - counts[present[-1]]) // 255 if present.size else 0
            if step == 0:
                tables[channel] = LEVELS
                continue
            lower_count = np.cumsum(counts) - counts
            tables[channel] = np.minimum((lower_count + step // 2) // step, 255)
        return tables


def _shared(table: np.ndarray) -> np.ndarray:
    """Return one table for all channels, as a (3, 256) view."""
    return np.broadcast_to(table.astype(np.uint8), (3, 256))


@lru_cache(maxsize=257)
def _solarized(threshold: int) -> np.ndarray:
    return _shared(np.where(threshold <= LEVELS, 255 - LEVELS, LEVELS))


@lru_cache(maxsize=8)
def _posterized(bits: int) -> np.ndarray:
    return _shared(LEVELS & (0xFF00 >> bits) & 0xFF)


def chain(ops: Sequence[tuple[type[ToneOp], Args]], histogram: np.ndarray) -> np.ndarray:
    """Compose the tables of the drawn ops to one (3, 256) uint8 table. histogram: as for `ToneOp.table`."""
    (first, args), *others = ops
    total = first.table(args, histogram)
    for op, args in others:
        current_histogram = histogram
        if op.needs_histogram:
            current_histogram = np.stack(
                [np.bincount(total[c], weights=histogram[c], minlength=256) for c in range(3)]
            ).astype(np.int64)
        table = op.table(args, current_histogram)
        if total.strides[0] == table.strides[0] == 0:
            total = _shared(table[0][total[0]])
        else:
            total = np.take_along_axis(table, total.astype(np.intp), axis=1)
    return total


TONE: Mapping[str, type[ToneOp]] = MappingProxyType(
    {
        "Gamma": Gamma,
        "Invert": Invert,
        "Solarize": Solarize,
        "Posterize": Posterize,
        "AutoContrast": AutoContrast,
        "Equalize": Equalize,
    }
)
