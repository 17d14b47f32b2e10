"""The passes over the pixels that a plan is fused into. The executors run them; nothing here touches pixels."""

import math
from dataclasses import dataclass, replace

import numpy as np

from refract.augment.ops.base import Args, Size
from refract.augment.ops.color import ColorOp
from refract.augment.ops.erasing import ErasingOp
from refract.augment.ops.geometric import Matrix, product
from refract.augment.ops.pixel import PixelOp
from refract.augment.ops.tone import ToneOp, chain

_CLOSE = 1e-6


@dataclass(frozen=True)
class WarpPass:
    """One resampling.

    matrix: maps output points to input points (see `refract.augment.ops.geometric`). size: (height, width) of the output.
    interpolation: `bilinear`, `bicubic` or a library of `refract.augment.resize_libraries`.
    """

    matrix: Matrix
    size: tuple[int, int]
    border: str = "constant"
    fill: tuple[int, int, int] = (0, 0, 0)
    interpolation: str = "bilinear"

    @property
    def is_perspective(self) -> bool:
        return self.matrix[6:] != (0.0, 0.0, 1.0)

    def shown_box(self) -> tuple[int, int, int, int] | None:
        """Return the box (top, bottom, left, right) of the input that the warp shows; None if it is not axis-aligned on whole pixels.

        The box may reach beyond the input. Such a warp is a resized crop: it repeats the box's last pixels and does not read beyond them.
        """
        extent = self.extent()
        if extent is None:
            return None
        low, high, near, far = extent
        top, bottom, left, right = round(low), round(high), round(near), round(far)
        error = max(abs(top - low), abs(bottom - high), abs(left - near), abs(right - far))
        return (top, bottom, left, right) if error < 1e-4 else None

    def inside(self, size: Size) -> tuple[bool, bool]:
        """Whether an axis-aligned warp stays inside the (upper and lower, left and right) edges of an input of `size` (height, width).

        The executors then do not blend the border into the outermost pixels.
        """
        extent = self.extent()
        if extent is None:
            return False, False
        low, high, near, far = extent
        return low > -1e-3 and high < size[0] + 1e-3, near > -1e-3 and far < size[1] + 1e-3

    def extent(self) -> tuple[float, float, float, float] | None:
        """Return (top, bottom, left, right) of the input that the warp shows; None if it is not axis-aligned."""
        a, b, c, d, e, f = self.matrix[:6]
        if self.is_perspective:
            return None
        if abs(a) < _CLOSE and abs(e) < _CLOSE:  # rotated by 90°
            a, e, across, down = b, d, self.size[0], self.size[1]
        elif abs(b) < _CLOSE and abs(d) < _CLOSE:
            across, down = self.size[1], self.size[0]
        else:
            return None
        low, high = (f, f + e * down) if e > 0 else (f + e * down, f)
        near, far = (c, c + a * across) if a > 0 else (c + a * across, c)
        return low, high, near, far

    def shrink(self) -> tuple[int, int]:
        """Return the powers of two (vertical, horizontal) by which a box filter first reduces the input, against aliasing.

        A reduction below 2 needs no box filter: the bilinear resampling does it. A perspective uses the reduction at the centre.
        """
        a, b, c, d, e, f, g, h, i = self.matrix
        if self.is_perspective:
            # The derivative of the projected point by the output point.
            x, y = self.size[1] / 2, self.size[0] / 2
            depth = g * x + h * y + i
            u, v = (a * x + b * y + c) / depth, (d * x + e * y + f) / depth
            a, b, d, e = (a - u * g) / depth, (b - u * h) / depth, (d - v * g) / depth, (e - v * h) / depth
        return _power_of_two(math.hypot(d, e)), _power_of_two(math.hypot(a, b))

    def footprint(self, size: Size) -> tuple[int, int, int, int]:
        """Return the box (top, left, height, width) that the pass reads, inside an input of `size`, not empty."""
        height, width = size
        if self.border in ("reflect", "reflect101"):
            return 0, 0, height, width
        a, b, c, d, e, f, g, h, i = self.matrix
        columns, rows = [], []
        for x, y in ((0, 0), (self.size[1], 0), (0, self.size[0]), (self.size[1], self.size[0])):
            depth = g * x + h * y + i
            if depth <= 0:  # the horizon is inside the image
                return 0, 0, height, width
            columns.append((a * x + b * y + c) / depth)
            rows.append((d * x + e * y + f) / depth)
        vertical, horizontal = self.shrink()
        # Two pixels of the box-filtered input: bilinear resampling reads one pixel beyond the box, bicubic two.
        top, bottom = min(rows) - 2 * vertical, max(rows) + 2 * vertical
        left, right = min(columns) - 2 * horizontal, max(columns) + 2 * horizontal
        first_row, first_column = min(max(0, math.floor(top)), height - 1), min(max(0, math.floor(left)), width - 1)
        last_row, last_column = max(min(height, math.ceil(bottom)), 1), max(min(width, math.ceil(right)), 1)
        return first_row, first_column, max(1, last_row - first_row), max(1, last_column - first_column)

    def on_part(self, scale: int, top: float, left: float) -> "WarpPass":
        """Return the same pass for a part of the input, reduced by `scale`. top, left: the part's start in reduced pixels."""
        if scale == 1 and top == left == 0:
            return self
        into = (1 / scale, 0.0, -left, 0.0, 1 / scale, -top, 0.0, 0.0, 1.0)
        return replace(self, matrix=product(into, self.matrix))


@dataclass(frozen=True)
class ColorPass:
    """One 3×4 matrix for each pixel's colour. It is computed when the pass runs, since contrast needs the image's mean."""

    steps: tuple[tuple[type[ColorOp], Args], ...]

    @property
    def needs_mean(self) -> bool:
        return any(op.needs_mean(args) for op, args in self.steps)

    def matrix(self, mean: np.ndarray) -> np.ndarray:
        """Return the 3×4 float64 matrix for (R, G, B, 1), in grey levels. mean: (3,) the input's mean colour, in grey levels."""
        (first, first_args), *others = self.steps
        total = first.color(first_args, mean)
        for op, args in others:
            total = op.color(args, total[:3, :3] @ mean + total[:3, 3]) @ total
        return total[:3]


@dataclass(frozen=True)
class HsvHuePass:
    """One hue rotation in HSV, for `exact` plans. turns: rotation as a fraction of the colour circle."""

    turns: float


@dataclass(frozen=True)
class TablePass:
    """One look-up table of 256 entries for each channel."""

    steps: tuple[tuple[type[ToneOp], Args], ...]

    @property
    def needs_histogram(self) -> bool:
        return any(op.needs_histogram for op, _ in self.steps)

    def table(self, histogram: np.ndarray) -> np.ndarray:
        """Return the tables, uint8 (3, 256). histogram: see `ToneOp.table`."""
        return chain(self.steps, histogram)


@dataclass(frozen=True)
class OpPass:
    """One pixel or erasing op, not fused."""

    op: type[PixelOp] | type[ErasingOp]
    args: Args


@dataclass(frozen=True)
class BlendPass:
    """A weighted sum of the image and of results of other passes on it, rounded and clipped.

    name: the op; image_weight: the weight of the image itself; chains: (weight, passes on the image) for each term.
    """

    name: str
    image_weight: float
    chains: tuple[tuple[float, tuple["Pass", ...]], ...]


Pass = WarpPass | ColorPass | HsvHuePass | TablePass | OpPass | BlendPass


def _power_of_two(reduction: float) -> int:
    return 1 << max(0, int(reduction + 1e-6).bit_length() - 1)
