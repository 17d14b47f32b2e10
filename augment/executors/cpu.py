"""The cpu executor: passes on one uint8 H×W×3 array, by OpenCV. Nothing here changes its input."""

from collections.abc import Iterable
from dataclasses import replace

import cv2
import numpy as np
import stringzilla

from refract.augment.fuse import ColorPass, HsvHuePass, OpPass, Pass, TablePass, WarpPass
from refract.augment.ops.geometric import Matrix, product
from refract.augment.ops.geometric import matrix as matrix_of

_BORDERS = {
    "constant": cv2.BORDER_CONSTANT,
    "edge": cv2.BORDER_REPLICATE,
    "reflect": cv2.BORDER_REFLECT,
    "reflect101": cv2.BORDER_REFLECT_101,
}
_FILTERS = {"bilinear": (cv2.INTER_LINEAR, 1), "bicubic": (cv2.INTER_CUBIC, 2)}
"""OpenCV's name of each interpolation, and how many pixels it looks beyond a point."""
_TO_CENTRES, _TO_EDGES = matrix_of(1, 0, -0.5, 0, 1, -0.5), matrix_of(1, 0, 0.5, 0, 1, 0.5)
_LEVELS = np.arange(256, dtype=np.uint8)
_NO_MEAN, _NO_HISTOGRAM = np.zeros(3), np.zeros((3, 256), np.int64)
_CLOSE = 1e-6


def run(passes: Iterable[Pass], image: np.ndarray) -> np.ndarray:
    """The passes in order. image: uint8 H×W×3. Returns a new C-contiguous uint8 array."""
    result = image
    for item in passes:
        result = run_pass(item, result)
    if result.base is None and result is not image and result.flags.c_contiguous:  # as OpenCV's results are
        return result
    return result.copy() if np.may_share_memory(result, image) else np.ascontiguousarray(result)


def run_pass(item: Pass, image: np.ndarray) -> np.ndarray:
    """One pass; the result may be a view of `image`."""
    if isinstance(item, WarpPass):
        return warp(item, image)
    if isinstance(item, ColorPass):
        return recolor(item, image)
    if isinstance(item, TablePass):
        return look_up(item, image)
    if isinstance(item, OpPass):
        return item.op.on_image(item.args, image)
    return turn_hue(item, image)


def planes(image: np.ndarray) -> np.ndarray:
    """A uint8 3×H×W copy of a uint8 H×W×3 array, as networks take it: in a third of the time of NumPy's transposition."""
    result = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, list(result))
    return result


def recolor(item: ColorPass, image: np.ndarray) -> np.ndarray:
    """One colour matrix over the image."""
    mean = np.array(cv2.mean(image)[:3]) if item.needs_mean else _NO_MEAN
    matrix = item.matrix(mean)
    (r, r_g, r_b, r_1), (g_r, g, g_b, g_1), (b_r, b_g, b, b_1) = matrix.tolist()
    if r == g == b and r_1 == g_1 == b_1 and not (r_g or r_b or g_r or g_b or b_r or b_g):
        # The same for all values, as brightness and contrast are: a table takes a quarter of the time.
        return _translated(image.copy(), cv2.addWeighted(_LEVELS, r, _LEVELS, 0, r_1))
    return cv2.transform(image, matrix)


def turn_hue(item: HsvHuePass, image: np.ndarray) -> np.ndarray:
    """A hue turned in HSV, in floating point."""
    hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + 360 * item.turns) % 360
    return np.clip(np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)), 0, 255).astype(np.uint8)


def look_up(item: TablePass, image: np.ndarray) -> np.ndarray:
    """One table for each channel."""
    if not item.needs_histogram:
        table = item.table(_NO_HISTOGRAM)
        if table.strides[0] == 0:  # one table, shown three times
            return _translated(image.copy(), table[0])
        channels = cv2.split(image)
    else:
        channels = cv2.split(image)
        counts = [cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel() for channel in channels]
        table = item.table(np.array(counts, np.int64))
    return cv2.merge([_translated(channel, own) for channel, own in zip(channels, table, strict=True)])


def _translated(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`values`, changed in place. Both uint8 and contiguous."""
    stringzilla.translate(values.data, np.ascontiguousarray(table).data, inplace=True)
    return values


def warp(item: WarpPass, image: np.ndarray) -> np.ndarray:
    """One resampling, after a box filter where it reduces by 2 or more."""
    a, b, c, d, e, f = item.matrix[:6]
    height, width = item.size
    box = item.shows()
    if box is not None and abs(a) < _CLOSE and abs(e) < _CLOSE:
        return warp(replace(item, matrix=(d, e, f, a, b, c, 0.0, 0.0, 1.0)), cv2.transpose(image))
    if box is not None:
        top, bottom, left, right = box
        if (bottom - top, right - left) == item.size:
            return _flip(_cut(image, box, item), a < 0, e < 0)
    vertical, horizontal = item.shrink()
    how, reach = _FILTERS[item.interpolation]
    if box is not None:
        inside = top >= 0 and bottom <= image.shape[0] and left >= 0 and right <= image.shape[1]
        if inside and vertical == horizontal == 1:
            region = image[top:bottom, left:right]
            return _flip(cv2.resize(region, (width, height), interpolation=how), a < 0, e < 0)
    matrix, border = item.matrix, item.border
    within = item.inside(image.shape[:2])
    if vertical > 1 or horizontal > 1:
        image, matrix = _shrunk_region(image, item, vertical, horizontal)
    if all(within):
        border = "edge"
    elif any(within):  # the border shows at two edges; the outermost pixels are repeated at the other two
        rows, columns = (reach * shown for shown in within)
        image = cv2.copyMakeBorder(image, rows, rows, columns, columns, cv2.BORDER_REPLICATE)
        matrix = product((1.0, 0.0, float(columns), 0.0, 1.0, float(rows), 0.0, 0.0, 1.0), matrix)
    # OpenCV counts from pixel centres, the plan from pixel edges.
    numbers = np.array(product(_TO_CENTRES, product(matrix, _TO_EDGES))).reshape(3, 3)
    how |= cv2.WARP_INVERSE_MAP
    if item.is_perspective:
        return cv2.warpPerspective(image, numbers, (width, height), None, how, _BORDERS[border], item.fill)
    return cv2.warpAffine(image, numbers[:2], (width, height), None, how, _BORDERS[border], item.fill)


def _cut(image: np.ndarray, box: tuple[int, int, int, int], item: WarpPass) -> np.ndarray:
    """The box of the image, with the border where it reaches beyond."""
    top, bottom, left, right = box
    height, width = image.shape[:2]
    around = (max(0, -top), max(0, bottom - height), max(0, -left), max(0, right - width))
    if not any(around):
        return image[top:bottom, left:right]
    empty = top >= height or left >= width or bottom <= 0 or right <= 0
    if item.border == "constant" and not empty:
        inner = image[max(0, top) : bottom, max(0, left) : right]
        return cv2.copyMakeBorder(inner, *around, cv2.BORDER_CONSTANT, value=item.fill)
    padded = cv2.copyMakeBorder(image, *around, _BORDERS[item.border], value=item.fill)
    return padded[max(0, top) :, max(0, left) :][: bottom - top, : right - left]


def _flip(image: np.ndarray, horizontal: bool, vertical: bool) -> np.ndarray:
    if not horizontal and not vertical:
        return image
    return cv2.flip(image, -1 if horizontal and vertical else 1 if horizontal else 0)


def _shrink(image: np.ndarray, vertical: int, horizontal: int) -> np.ndarray:
    """Means of vertical × horizontal boxes, powers of two; the last pixels are repeated where the sides are no multiples."""
    height, width = image.shape[:2]
    below, beside = -height % vertical, -width % horizontal
    if below or beside:
        image = cv2.copyMakeBorder(image, 0, below, 0, beside, cv2.BORDER_REPLICATE)
    # Halving is where OpenCV is fast: 4×4 takes 0.17 ms of a 900² image in two halvings, 0.55 ms by INTER_AREA at once, and a
    # bilinear resampling to exactly the half takes the mean of two pixels in a quarter of the time of INTER_AREA.
    while vertical > 1 or horizontal > 1:
        down, across = min(vertical, 2), min(horizontal, 2)
        how = cv2.INTER_AREA if down == across else cv2.INTER_LINEAR
        image = cv2.resize(image, (image.shape[1] // across, image.shape[0] // down), interpolation=how)
        vertical, horizontal = vertical // down, horizontal // across
    return image


def _shrunk_region(image: np.ndarray, item: WarpPass, vertical: int, horizontal: int) -> tuple[np.ndarray, Matrix]:
    """The box-filtered part of the image that the warp reads, and the matrix into it."""
    height, width = image.shape[:2]
    top, left, rows, columns = item.footprint((height, width))
    right, bottom = left + columns, top + rows
    # The part starts and ends on the filter's own grid, so that it is filtered as the whole would be.
    left, top = left // horizontal * horizontal, top // vertical * vertical
    right, bottom = min(width, -(-right // horizontal) * horizontal), min(height, -(-bottom // vertical) * vertical)
    region = _shrink(image[top:bottom, left:right], vertical, horizontal)
    into = (1 / horizontal, 0.0, -left / horizontal, 0.0, 1 / vertical, -top / vertical, 0.0, 0.0, 1.0)
    return region, product(into, item.matrix)
