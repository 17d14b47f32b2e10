"""Warps as numbers: how far a pass reduces the image, and which part of it an axis-aligned pass shows."""

import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from refract.augment.ops.geometric import product
from refract.augment.passes import WarpPass

slopes = st.floats(-6, 6)
offsets = st.floats(-900, 900)
tilts = st.floats(-0.004, 0.004)


def projected(matrix: tuple[float, ...], x: float, y: float) -> np.ndarray:
    u, v, depth = np.array(matrix).reshape(3, 3) @ (x, y, 1.0)
    return np.array([u, v]) / depth


@given(st.tuples(slopes, slopes, offsets, slopes, slopes, offsets, tilts, tilts))
@example((1.9, 0.0, 90.0, 0.0, 1.0, 0.0, -0.004, 0.0))  # the offset decides about the power of two
@example((1.0, 0.0, 0.0, 0.0, 1.9, 90.0, 0.0, -0.004))
@example((4.0, 6.0, 0.0, 0.0, 1.0, 0.0, -0.004, 0.0))  # the shear does
@example((1.0, 0.0, 0.0, 6.0, 4.0, 0.0, 0.0, -0.004))
def test_a_perspective_is_reduced_by_the_slope_at_its_centre(numbers: tuple[float, ...]) -> None:
    """Compared with differences of the projection itself."""
    matrix = (*numbers, 1.0)
    x, y, step = 20.0, 15.0, 1e-4
    assume(abs(numbers[6]) + abs(numbers[7]) > 1e-4 and numbers[6] * x + numbers[7] * y + 1 > 0.2)
    along = (projected(matrix, x + step, y) - projected(matrix, x - step, y)) / (2 * step)
    down = (projected(matrix, x, y + step) - projected(matrix, x, y - step)) / (2 * step)
    horizontal, vertical = np.hypot(along, down)
    for reduction in (vertical, horizontal):  # no power of two so near that rounding decides
        assume(abs(math.log2(max(reduction, 0.5))) % 1 > 1e-3)
    expected = tuple(2 ** max(0, math.floor(math.log2(max(r, 0.5)))) for r in (vertical, horizontal))
    assert WarpPass(matrix, (30, 40)).shrink() == expected


@pytest.mark.parametrize("quarter_turns", range(4))
@pytest.mark.parametrize("flip", [False, True])
@settings(max_examples=25)
@given(top=st.integers(-5, 20), left=st.integers(-5, 20), height=st.integers(1, 30), width=st.integers(1, 30))
def test_a_turned_or_flipped_crop_shows_its_box(
    quarter_turns: int, flip: bool, top: int, left: int, height: int, width: int
) -> None:
    matrix = (1.0, 0.0, float(left), 0.0, 1.0, float(top), 0.0, 0.0, 1.0)
    size = (height, width)
    if flip:
        matrix = product(matrix, (-1.0, 0.0, float(width), 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    for _ in range(quarter_turns):
        matrix = product(matrix, (0.0, 1.0, 0.0, -1.0, 0.0, float(size[0]), 0.0, 0.0, 1.0))
        size = size[::-1]
    item = WarpPass(matrix, size)
    assert item.shown_box() == (top, top + height, left, left + width)
    assert item.inside((top + height, left + width)) == (top >= 0, left >= 0)
    assert item.inside((top + height - 1, left + width - 1)) == (False, False)
