"""Apply a plan to masks and boxes: they follow their image through the passes that move pixels.

Passes that only change values (colour, noise, erasing) do not change masks and boxes. MixUp and CutMix are not applied to them.
ValueError for a step that moves pixels in an unknown way: AugMix with moved copies, the corruption `elastic_transform`, and third-party
transforms, except those known to keep every pixel in its position.
"""

from collections.abc import Iterator

import numpy as np

from refract.augment.fuse import fuse
from refract.augment.ops.base import Size
from refract.augment.ops.deform import DeformOp
from refract.augment.ops.pixel import PixelOp
from refract.augment.passes import BlendPass, OpPass, Pass, WarpPass
from refract.augment.plan import Plan

_TIE = 1e-6
"""Tolerance in pixels: a centre on the edge of two pixels belongs to the later one, despite rounding."""


def move_mask(plan: Plan, mask: np.ndarray, *, fill: int = 0) -> np.ndarray:
    """Move a mask as the plan moves its image: each output pixel takes the value of the input pixel that contains its centre.

    mask: H×W or H×W×C of any dtype, of the size that the plan was drawn for. It is not changed.
    fill: value beyond the image for the border `constant`, such as a loss's ignore index. The other borders repeat the mask like the image.
    Returns a new array of the mask's dtype.
    ValueError for another size, a `fill` outside the dtype, or a step that moves pixels in an unknown way.
    """
    result = np.asarray(mask)
    if result.ndim not in (2, 3) or result.shape[:2] != plan.size:
        raise ValueError(
            f"mask: the plan was drawn for {plan.size[0]}×{plan.size[1]} pixels, the mask has {'×'.join(map(str, result.shape))}"
        )
    try:
        fits = result.dtype.type(fill) == fill
    except (OverflowError, ValueError, TypeError):
        fits = False
    if not fits:
        raise ValueError(f"fill: {fill!r} is not a value of the mask's dtype {result.dtype}")
    for item in _movements(plan):
        result = _warp(item, result, fill) if isinstance(item, WarpPass) else _deform(item, result)
    return result.copy() if np.may_share_memory(result, mask) else np.ascontiguousarray(result)


def move_boxes(plan: Plan, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move boxes as the plan moves their image.

    boxes: N×4 numbers (top, left, height, width) in pixels of the image that the plan was drawn for. Parts beyond the image are clipped.
    Returns (boxes, visible) with N rows each, in the order of the input.
    boxes: float32 N×4, the smallest upright box around the visible part of each transformed box; zeros if nothing is visible.
    visible: float32 N, the fraction in 0…1 of the box's area that the output shows. Select labels by `visible >= 0.3`, for example.
    Affine and perspective steps are exact up to rounding. After a deformation, the box encloses every output pixel that shows one of its
    points.
    ValueError for boxes that are not N×4 finite numbers, a negative height or width, or a step that moves pixels in an unknown way.
    """
    array = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) if np.size(boxes) == 0 else np.asarray(boxes, np.float64)
    if array.ndim != 2 or array.shape[1] != 4 or not np.isfinite(array).all() or (array[:, 2:] < 0).any():
        raise ValueError(
            "boxes: expected N×4 finite numbers (top, left, height, width) with height and width of at least 0, got "
            + (f"an array {'×'.join(map(str, array.shape))}" if array.ndim != 2 or array.shape[1] != 4 else repr(boxes))
        )
    polygons = [_clip(_corners(*box), _frame(plan.size)) for box in array.tolist()]
    visible = np.array([float(_area(polygon) > 0) for polygon in polygons])
    size = plan.size
    for item in _movements(plan):
        if isinstance(item, WarpPass):
            forward = np.linalg.inv(np.array(item.matrix).reshape(3, 3))
            inside = _frame(item.size) @ forward
            for i, polygon in enumerate(polygons):
                area = _area(polygon)
                polygon = _clip(polygon, inside) if area else polygon[:0]
                visible[i] *= min(1.0, _area(polygon) / area) if area else 0.0
                polygons[i] = _project(polygon, forward)
            size = item.size
        else:
            x, y = item.op.maps(item.args, size)  # type: ignore[union-attr]
            sources = _reflect(x + 0.5, size[1]), _reflect(y + 0.5, size[0])
            polygons = [_deformed_box(polygon, *sources) for polygon in polygons]
    result = np.array([_upright(polygon, size) for polygon in polygons], np.float32).reshape(-1, 4)
    return result, np.where(result[:, 2:].min(axis=1, initial=np.inf) > 0, visible, 0).astype(np.float32)


def _movements(plan: Plan) -> Iterator[WarpPass | OpPass]:
    """Yield the passes that move pixels: each warp, and each deformation as an `OpPass`. ValueError for other ops that move pixels."""
    for item in fuse(plan):
        if isinstance(item, WarpPass) or (isinstance(item, OpPass) and issubclass(item.op, DeformOp)):
            yield item
        elif _moves_pixels(item):
            name = _name(item)
            raise ValueError(
                f"masks and boxes cannot follow {name}: it moves pixels in an unknown way; remove it from the policy, or use geometric ops"
            )


def _moves_pixels(item: Pass) -> bool:
    if isinstance(item, BlendPass):
        return any(_moves_pixels(inner) for _, passes in item.chains for inner in passes)
    if isinstance(item, OpPass):
        return issubclass(item.op, DeformOp) or (issubclass(item.op, PixelOp) and item.op.moves_pixels(item.args))
    return isinstance(item, WarpPass)


def _name(item: Pass) -> str:
    if isinstance(item, BlendPass):
        return item.name
    assert isinstance(item, OpPass)
    return str(item.args.get("transform") or item.args.get("name") or item.op.__name__)


def _warp(item: WarpPass, mask: np.ndarray, fill: int) -> np.ndarray:
    a, b, c, d, e, f, g, h, i = item.matrix
    x, y = (np.arange(side) + 0.5 for side in (item.size[1], item.size[0]))
    if item.is_perspective or not (b == d == 0 or a == e == 0):
        x, y = np.meshgrid(x, y)
        depth = g * x + h * y + i
        u, v = ((p * x + q * y + r) / depth for p, q, r in ((a, b, c), (d, e, f)))
        return _sample(mask, v, u, item.border, fill)
    if a == e == 0:
        return _sample(mask, (d * x + f)[None, :], (b * y + c)[:, None], item.border, fill)
    return _sample(mask, (e * y + f)[:, None], (a * x + c)[None, :], item.border, fill)


def _deform(item: OpPass, mask: np.ndarray) -> np.ndarray:
    x, y = item.op.maps(item.args, mask.shape[:2])  # type: ignore[union-attr]
    return _sample(mask, y + 0.5, x + 0.5, "reflect", 0)


def _sample(mask: np.ndarray, v: np.ndarray, u: np.ndarray, border: str, fill: int) -> np.ndarray:
    """Return the values of the pixels that contain the points (v down, u right). v and u broadcast to the output's size."""
    height, width = mask.shape[:2]
    rows, columns = (np.floor(np.clip(at, -1e9, 1e9) + _TIE).astype(np.int64) for at in (v, u))
    if border == "reflect":
        rows, columns = (
            np.minimum(at % (2 * n), 2 * n - 1 - at % (2 * n)) for at, n in ((rows, height), (columns, width))
        )
        return mask[rows, columns]
    if border == "reflect101":
        return mask[_reflect_101(rows, height), _reflect_101(columns, width)]
    beyond = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
    result = mask[rows.clip(0, height - 1), columns.clip(0, width - 1)]
    if border == "constant":
        result[beyond] = fill
    return result


def _reflect_101(at: np.ndarray, length: int) -> np.ndarray:
    """Reflect integer positions about the first and the last of 0 … length − 1."""
    period = max(1, 2 * (length - 1))
    return np.minimum(at % period, period - at % period) if length > 1 else np.zeros_like(at)


def _corners(top: float, left: float, height: float, width: float) -> np.ndarray:
    """Return a box as a polygon: 4×2 points (x, y) in order around it."""
    bottom, right = top + height, left + width
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _frame(size: Size) -> np.ndarray:
    """Return 5×3 functionals of homogeneous points (x, y, w). All are ≥ 0 exactly for points inside an image of `size`."""
    height, width = size
    return np.array([(1, 0, 0), (-1, 0, width), (0, 1, 0), (0, -1, height), (0, 0, 1)], np.float64)


def _clip(polygon: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Clip a convex polygon to where every functional is ≥ 0. (Sutherland & Hodgman 1974, "Reentrant polygon clipping".)"""
    points = polygon.tolist()
    for p, q, r in edges.tolist():
        values = [p * x + q * y + r for x, y in points]
        clipped = []
        for k, (x, y) in enumerate(points):
            (x0, y0), before, now = points[k - 1], values[k - 1], values[k]
            if (before < 0) != (now < 0):
                t = before / (before - now)
                clipped.append((x0 + t * (x - x0), y0 + t * (y - y0)))
            if now >= 0:
                clipped.append((x, y))
        points = clipped
    return np.array(points, np.float64).reshape(-1, 2)


def _project(polygon: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    points = np.column_stack([polygon, np.ones(len(polygon))]) @ matrix.T
    return points[:, :2] / np.maximum(points[:, 2:], 1e-12)


def _area(polygon: np.ndarray) -> float:
    return abs(_signed_area(polygon))


def _signed_area(polygon: np.ndarray) -> float:
    """Return the area in square pixels, negative for points in counter-clockwise order as displayed (y points down)."""
    if len(polygon) < 3:
        return 0.0
    x, y = (polygon - polygon[0]).T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _upright(polygon: np.ndarray, size: Size) -> tuple[float, float, float, float]:
    """Return the upright box (top, left, height, width) around a polygon, clipped to an image of `size`."""
    if len(polygon) < 3:
        return 0.0, 0.0, 0.0, 0.0
    (left, top), (right, bottom) = (at.clip(0, (size[1], size[0])).tolist() for at in (polygon.min(0), polygon.max(0)))
    return top, left, bottom - top, right - left


def _deformed_box(polygon: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the upright box around the pixels whose input points (x, y) lie in a convex polygon, as a polygon."""
    if len(polygon) < 3:
        return polygon[:0]
    edges = np.roll(polygon, -1, axis=0) - polygon
    direction = np.sign(_signed_area(polygon))
    inside = np.ones(x.shape, bool)
    for (px, py), (dx, dy) in zip(polygon, edges, strict=True):
        inside &= direction * (dx * (y - py) - dy * (x - px)) >= 0
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not rows.size:
        return polygon[:0]
    return _corners(rows[0], columns[0], rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0])


def _reflect(at: np.ndarray, length: int) -> np.ndarray:
    """Reflect continuous coordinates at both ends of 0…length."""
    folded = np.mod(at, 2 * length)
    return np.minimum(folded, 2 * length - folded)
