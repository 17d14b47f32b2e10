"""From a plan's steps to as few passes over the pixels as do the same: neighbours of one kind become one pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from augment.ops import OPS
from augment.ops.color import COLOR, LUMA
from augment.ops.geometric import GEOMETRIC
from augment.ops.pixel import PIXEL, PixelOp
from augment.ops.region import REGION, RegionOp
from augment.plan import Plan, Step

__all__ = ["LUMA", "ColorPass", "OpPass", "Pass", "WarpPass", "batch_steps", "fuse"]


@dataclass(frozen=True)
class WarpPass:
    """One resampling. matrix: 3×3 from output to input points (see `augment.ops.geometric`); size: (height, width) of the output."""

    matrix: np.ndarray
    size: tuple[int, int]
    border: str = "constant"
    fill: tuple[int, int, int] = (0, 0, 0)

    def shrink(self) -> tuple[int, int]:
        """Powers of two (vertical, horizontal) by which the input is box-filtered first, against aliasing: less than twofold
        reduction is left to the bilinear resampling itself."""
        rows = np.hypot(self.matrix[:2, 0], self.matrix[:2, 1]).tolist()
        return _power_of_two(rows[1]), _power_of_two(rows[0])

    def footprint(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The box (top, left, height, width) of an input of `size` that the pass reads, inside it and not empty."""
        height, width = size
        if self.border == "reflect":
            return 0, 0, height, width
        corners = self.matrix[:2] @ np.array(
            [[0, self.size[1], 0, self.size[1]], [0, 0, self.size[0], self.size[0]], [1, 1, 1, 1]]
        )
        vertical, horizontal = self.shrink()
        # Two pixels of what the filters leave: bilinear resampling looks one pixel beyond.
        margin = np.array([2 * horizontal, 2 * vertical])
        left, top = (corners.min(1) - margin).tolist()
        right, bottom = (corners.max(1) + margin).tolist()
        first_row, first_column = min(max(0, math.floor(top)), height - 1), min(max(0, math.floor(left)), width - 1)
        last_row, last_column = max(min(height, math.ceil(bottom)), 1), max(min(width, math.ceil(right)), 1)
        return first_row, first_column, max(1, last_row - first_row), max(1, last_column - first_column)

    def on_part(self, scale: int, top: float, left: float) -> "WarpPass":
        """The same pass on an input of which only a part is there, reduced by `scale`. top, left: where that part begins, reduced."""
        if scale == 1 and top == left == 0:
            return self
        into = np.array([[1 / scale, 0, -left], [0, 1 / scale, -top], [0, 0, 1]])
        return WarpPass(into @ self.matrix, self.size, self.border, self.fill)


def _power_of_two(reduction: float) -> int:
    return 1 << max(0, int(reduction + 1e-6).bit_length() - 1)


@dataclass(frozen=True)
class ColorPass:
    """One 3×4 matrix on each colour. Contrast needs the picture's mean, so the matrix is made when the pass runs."""

    steps: tuple[Step, ...]

    def matrix(self, mean: np.ndarray) -> np.ndarray:
        """3×4 float64 on (R, G, B, 1), in grey levels. mean: (3,) the input's mean colour, in grey levels."""
        total = np.hstack([np.eye(3), np.zeros((3, 1))])
        for step in self.steps:
            here = total[:, :3] @ mean + total[:, 3]
            one = COLOR[step.op].color(dict(step.args), here)
            total = np.hstack([one[:, :3] @ total[:, :3], (one[:, :3] @ total[:, 3] + one[:, 3])[:, None]])
        return total


@dataclass(frozen=True)
class OpPass:
    """A pixel or region op, by itself."""

    op: type[PixelOp] | type[RegionOp]
    args: dict


Pass = WarpPass | ColorPass | OpPass


def fuse(plan: Plan) -> list[Pass]:
    """The passes of a plan for one picture, in order. Steps that mix a batch are left out: see `batch_steps`."""
    passes: list[Pass] = []
    size = plan.size
    for step in plan.steps:
        if step.op in GEOMETRIC:
            matrix, size = GEOMETRIC[step.op].geometry(dict(step.args), size)
            last = passes[-1] if passes else None
            if isinstance(last, WarpPass):
                matrix = last.matrix @ matrix
                passes.pop()
            border = step.args.get("border", last.border if isinstance(last, WarpPass) else "constant")
            fill = step.args.get("fill", last.fill if isinstance(last, WarpPass) else (0, 0, 0))
            passes.append(WarpPass(matrix, size, border, tuple(fill)))
        elif step.op in COLOR:
            if passes and isinstance(passes[-1], ColorPass):
                passes[-1] = ColorPass((*passes[-1].steps, step))
            else:
                passes.append(ColorPass((step,)))
        elif step.op in PIXEL:
            passes.append(OpPass(PIXEL[step.op], dict(step.args)))
        elif step.op in REGION:
            passes.append(OpPass(REGION[step.op], dict(step.args)))
    return passes


def batch_steps(plans: Sequence[Plan]) -> list[list[Step]]:
    """For each plan, its steps that mix the batch."""
    return [[step for step in plan.steps if OPS[step.op].kind == "batch"] for plan in plans]
