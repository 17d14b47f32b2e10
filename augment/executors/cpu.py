"""The CPU executor: run passes on one uint8 H×W×3 array by OpenCV. No function changes its input."""

from collections.abc import Iterable
from dataclasses import replace

import cv2
import numpy as np
import stringzilla

from refract.augment.ops.geometric import Matrix, product
from refract.augment.ops.geometric import matrix as matrix_of
from refract.augment.passes import BlendPass, ColorPass, HsvHuePass, OpPass, Pass, TablePass, WarpPass
from refract.augment.resize_libraries import LIBRARIES

_BORDERS = {
    "constant": cv2.BORDER_CONSTANT,
    "edge": cv2.BORDER_REPLICATE,
    "reflect": cv2.BORDER_REFLECT,
    "reflect101": cv2.BORDER_REFLECT_101,
}
_FILTERS = {"bilinear": (cv2.INTER_LINEAR, 1), "bicubic": (cv2.INTER_CUBIC, 2)}
"""OpenCV's flag of each interpolation, and its reach: how many pixels beyond a point it reads."""
_TO_CENTRES, _TO_EDGES = matrix_of(1, 0, -0.5, 0, 1, -0.5), matrix_of(1, 0, 0.5, 0, 1, 0.5)
_LEVELS = np.arange(256, dtype=np.uint8)
_NO_MEAN, _NO_HISTOGRAM = np.zeros(3), np.zeros((3, 256), np.int64)
_CLOSE = 1e-6


def run(passes: Iterable[Pass], image: np.ndarray) -> np.ndarray:
    """Run the passes in order. image: uint8 H×W×3. Returns a new C-contiguous uint8 array."""
    result = image
    for item in passes:
        result = run_pass(item, result)
    if result.base is None and result is not image and result.flags.c_contiguous:  # the case for OpenCV's results
        return result
    return result.copy() if np.may_share_memory(result, image) else np.ascontiguousarray(result)


def run_pass(item: Pass, image: np.ndarray) -> np.ndarray:
    """Run one pass. The result may be a view of `image`."""
    if isinstance(item, WarpPass):
        return warp(item, image)
    if isinstance(item, ColorPass):
        return recolor(item, image)
    if isinstance(item, TablePass):
        return look_up(item, image)
    if isinstance(item, OpPass):
        return item.op.on_image(item.args, image)
    if isinstance(item, BlendPass):
        return blend(item, image)
    return rotate_hue(item, image)


def blend(item: BlendPass, image: np.ndarray) -> np.ndarray:
    """The weighted sum of the image and of its chains' results."""
    total = image.astype(np.float32) * item.image_weight
    for weight, passes in item.chains:
        total += np.float32(weight) * run(passes, image)
    return np.clip(np.rint(total), 0, 255).astype(np.uint8)


def planes(image: np.ndarray) -> np.ndarray:
    """Copy a uint8 H×W×3 array to uint8 3×H×W, the layout of networks, in a third of the time of NumPy's transposition."""
    result = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, list(result))
    return result


def recolor(item: ColorPass, image: np.ndarray) -> np.ndarray:
    """Apply one colour matrix to every pixel."""
    mean = np.array(cv2.mean(image)[:3]) if item.needs_mean else _NO_MEAN
    matrix = item.matrix(mean)
    (r, r_g, r_b, r_1), (g_r, g, g_b, g_1), (b_r, b_g, b, b_1) = matrix.tolist()
    if r == g == b and r_1 == g_1 == b_1 and not (r_g or r_b or g_r or g_b or b_r or b_g):
        # One map for all channels, such as brightness or contrast: a table takes a quarter of the matrix's time.
        return _translate(image.copy(), cv2.addWeighted(_LEVELS, r, _LEVELS, 0, r_1))
    return cv2.transform(image, matrix)


def rotate_hue(item: HsvHuePass, image: np.ndarray) -> np.ndarray:
    """Rotate the hue in HSV, in floating point."""
    hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + 360 * item.turns) % 360
    return np.clip(np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)), 0, 255).astype(np.uint8)


def look_up(item: TablePass, image: np.ndarray) -> np.ndarray:
    """Map each channel by its table."""
    if not item.needs_histogram:
        table = item.table(_NO_HISTOGRAM)
        if table.strides[0] == 0:  # a broadcast view of one table
            return _translate(image.copy(), table[0])
        channels = cv2.split(image)
    else:
        channels = cv2.split(image)
        counts = [cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel() for channel in channels]
        table = item.table(np.array(counts, np.int64))
    return cv2.merge([_translate(channel, entries) for channel, entries in zip(channels, table, strict=True)])


def _translate(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Map `values` by `table` in place and return them. values: contiguous uint8. table: 256 uint8 entries."""
    stringzilla.translate(values.data, np.ascontiguousarray(table).data, inplace=True)
    return values


def warp(item: WarpPass, image: np.ndarray) -> np.ndarray:
    """Resample once, after a box filter if the warp reduces by 2 or more."""
    a, b, c, d, e, f = item.matrix[:6]
    height, width = item.size
    box = item.shown_box()
    if box is not None and abs(a) < _CLOSE and abs(e) < _CLOSE:
        return warp(replace(item, matrix=(d, e, f, a, b, c, 0.0, 0.0, 1.0)), cv2.transpose(image))
    if box is not None:
        top, bottom, left, right = box
        if (bottom - top, right - left) == item.size:
            return _flip(_crop(image, box, item), a < 0, e < 0)
    if item.interpolation in LIBRARIES:
        return _warp_by_library(item, image)
    vertical, horizontal = item.shrink()
    interpolation, reach = _FILTERS[item.interpolation]
    if box is not None:
        inside = top >= 0 and bottom <= image.shape[0] and left >= 0 and right <= image.shape[1]
        if inside and vertical == horizontal == 1:
            region = image[top:bottom, left:right]
            return _flip(cv2.resize(region, (width, height), interpolation=interpolation), a < 0, e < 0)
    matrix, border = item.matrix, item.border
    within = item.inside(image.shape[:2])
    if vertical > 1 or horizontal > 1:
        image, matrix = _shrunk_region(image, item, vertical, horizontal)
    if all(within):
        border = "edge"
    elif any(within):  # the border is visible at two edges; repeat the outermost pixels at the other two
        rows, columns = (reach * inner for inner in within)
        image = cv2.copyMakeBorder(image, rows, rows, columns, columns, cv2.BORDER_REPLICATE)
        matrix = product((1.0, 0.0, float(columns), 0.0, 1.0, float(rows), 0.0, 0.0, 1.0), matrix)
    # OpenCV's coordinates start at pixel centres, the plan's at pixel edges.
    centred = np.array(product(_TO_CENTRES, product(matrix, _TO_EDGES))).reshape(3, 3)
    flags = interpolation | cv2.WARP_INVERSE_MAP
    if item.is_perspective:
        return cv2.warpPerspective(image, centred, (width, height), None, flags, _BORDERS[border], item.fill)
    return cv2.warpAffine(image, centred[:2], (width, height), None, flags, _BORDERS[border], item.fill)


def _warp_by_library(item: WarpPass, image: np.ndarray) -> np.ndarray:
    """Resize and flip by the pass's library. A warp that rotates, shears or reaches beyond the image is Refract's."""
    a, b, c, d, e, f = item.matrix[:6]
    extent = item.extent()
    if extent is None or not all(item.inside(image.shape[:2])):
        return warp(replace(item, interpolation="bilinear"), image)
    if abs(a) < _CLOSE and abs(e) < _CLOSE:  # rotated by 90°
        return warp(replace(item, matrix=(d, e, f, a, b, c, 0.0, 0.0, 1.0)), cv2.transpose(image))
    rows, columns = image.shape[:2]
    whole = item.shown_box() or extent
    top, bottom, left, right = np.clip(whole, 0, [rows, rows, columns, columns]).tolist()
    resized = LIBRARIES[item.interpolation](image, item.size, (top, bottom, left, right))
    return _flip(resized, a < 0, e < 0)


def _crop(image: np.ndarray, box: tuple[int, int, int, int], item: WarpPass) -> np.ndarray:
    """Crop the box (top, bottom, left, right); pixels beyond the image take the pass's border."""
    top, bottom, left, right = box
    height, width = image.shape[:2]
    margins = (max(0, -top), max(0, bottom - height), max(0, -left), max(0, right - width))
    if not any(margins):
        return image[top:bottom, left:right]
    empty = top >= height or left >= width or bottom <= 0 or right <= 0
    if item.border == "constant" and not empty:
        inner = image[max(0, top) : bottom, max(0, left) : right]
        return cv2.copyMakeBorder(inner, *margins, cv2.BORDER_CONSTANT, value=item.fill)
    padded = cv2.copyMakeBorder(image, *margins, _BORDERS[item.border], value=item.fill)
    return padded[max(0, top) :, max(0, left) :][: bottom - top, : right - left]


def _flip(image: np.ndarray, horizontal: bool, vertical: bool) -> np.ndarray:
    if not horizontal and not vertical:
        return image
    return cv2.flip(image, -1 if horizontal and vertical else 1 if horizontal else 0)


def _shrink(image: np.ndarray, vertical: int, horizontal: int) -> np.ndarray:
    """Reduce to the means of vertical × horizontal boxes, powers of two. Sides are padded to multiples with the last pixels."""
    height, width = image.shape[:2]
    below, right = -height % vertical, -width % horizontal
    if below or right:
        image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE)
    # OpenCV halves fast: a 4×4 reduction of a 900² image takes 0.17 ms in two halvings and 0.55 ms in one INTER_AREA. Halving one side
    # by bilinear resampling, the mean of two pixels, takes a quarter of the time of INTER_AREA.
    while vertical > 1 or horizontal > 1:
        down, across = min(vertical, 2), min(horizontal, 2)
        interpolation = cv2.INTER_AREA if down == across else cv2.INTER_LINEAR
        image = cv2.resize(image, (image.shape[1] // across, image.shape[0] // down), interpolation=interpolation)
        vertical, horizontal = vertical // down, horizontal // across
    return image


def _shrunk_region(image: np.ndarray, item: WarpPass, vertical: int, horizontal: int) -> tuple[np.ndarray, Matrix]:
    """Return the box-filtered part of the image that the warp reads, and the warp's matrix for that part."""
    height, width = image.shape[:2]
    top, left, rows, columns = item.footprint((height, width))
    right, bottom = left + columns, top + rows
    # The part starts and ends on the filter's grid, so that its pixels equal those of the filtered whole image.
    left, top = left // horizontal * horizontal, top // vertical * vertical
    right, bottom = min(width, -(-right // horizontal) * horizontal), min(height, -(-bottom // vertical) * vertical)
    region = _shrink(image[top:bottom, left:right], vertical, horizontal)
    into = (1 / horizontal, 0.0, -left / horizontal, 0.0, 1 / vertical, -top / vertical, 0.0, 0.0, 1.0)
    return region, product(into, item.matrix)
