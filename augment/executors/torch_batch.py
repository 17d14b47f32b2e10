"""The batch executor: run one plan per sample on uint8 images on any device.

Its images equal those of the CPU executor for the same plan, within rounding.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from refract.augment.executors import cpu
from refract.augment.fuse import batch_steps, fuse
from refract.augment.on_device import on_device
from refract.augment.ops.mixing import MIX
from refract.augment.ops.pixel import column, to_uint8
from refract.augment.passes import BlendPass, ColorPass, HsvHuePass, OpPass, Pass, TablePass, WarpPass
from refract.augment.plan import Plan

# `_reflect` moves the points of `reflect101` inside: grid_sample supports this border only with align_corners=True.
_PADDING = {"constant": "zeros", "edge": "border", "reflect": "reflection", "reflect101": "border"}


def run(plans: Sequence[Plan], images: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Apply plans[i] to images[i], without the batch ops (MixUp, CutMix): see `mix`.

    images: uint8 N×3×H×W, or N tensors uint8 3×H×W whose sizes may differ; not changed. Returns a new uint8 tensor N×3×H'×W' on the same
    device. ValueError for other images or none in a list, a plan that was drawn for another size, or results of several sizes.
    """
    _check_images(images, len(plans))
    if isinstance(images, torch.Tensor):
        if not plans:
            return images.clone()
        images = images.unbind(0)
    mismatch = next((i for i, plan in enumerate(plans) if plan.size != tuple(images[i].shape[1:])), None)
    if mismatch is not None:
        height, width = images[mismatch].shape[1:]
        raise ValueError(f"plan {mismatch} was drawn for {plans[mismatch].size}, its image has {(height, width)}")
    parts = _run_all([fuse(plan) for plan in plans], images)
    sizes = {tuple(part.shape[1:]) for part in parts}
    if len(sizes) > 1:
        raise ValueError(
            f"the plans produce images of several sizes {sorted(sizes)}; pass `size` to Augmenter, or end the policy with a Resize"
        )
    return torch.stack(parts)


def _check_images(images: torch.Tensor | Sequence[torch.Tensor], count: int) -> None:
    if isinstance(images, torch.Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or count != images.shape[0]:
            raise ValueError(f"expected {count} images as uint8 N×3×H×W, got {images.dtype} {tuple(images.shape)}")
    elif not len(images) == count > 0:
        raise ValueError(f"expected an image for each of {count} plans, got {len(images)} images")
    else:
        odd = next((i for i, x in enumerate(images) if x.dtype != torch.uint8 or x.ndim != 3 or len(x) != 3), None)
        if odd is not None:
            shape = tuple(images[odd].shape)
            raise ValueError(f"image {odd}: expected uint8 3×H×W, got {images[odd].dtype} {shape}")


def _run_all(remaining: list[list[Pass]], images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Run remaining[i] on images[i], uint8 3×H×W. Returns the results, each uint8 3×H'×W'. Empties `remaining`."""
    # Samples draw different ops, so each round runs one pass for all samples whose next pass is of the same kind.
    parts = list(images)
    while any(remaining):
        lead = next(i for i, passes in enumerate(remaining) if passes)
        first, shape = remaining[lead][0], parts[lead].shape
        any_shape = isinstance(first, WarpPass)
        chosen = [
            i
            for i, passes in enumerate(remaining)
            if passes and _can_join(passes[0], first) and (any_shape or parts[i].shape == shape)
        ]
        results = _run_pass([remaining[i].pop(0) for i in chosen], [parts[i] for i in chosen])
        for i, result in zip(chosen, results, strict=True):
            parts[i] = result
    return parts


def mix(plans: Sequence[Plan], images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the plans' batch ops, in the policy's order, to images (any dtype, 0…255) and to float targets N×C.

    A batch of one has no partner and is returned unchanged. Inputs are not changed. ValueError for targets that are not float N×C.
    """
    count = images.shape[0]
    if targets.ndim != 2 or targets.shape[0] != count or not targets.is_floating_point():
        raise ValueError(f"targets: expected float N×C for {count} images, got {targets.dtype} {tuple(targets.shape)}")
    steps = batch_steps(plans)
    if count < 2:
        return images, targets
    for position in range(max(map(len, steps))):
        # Every step of this round reads the images of the previous round.
        before, labels = images, targets
        for name, op in MIX.items():
            drawn = {
                i: sample_steps[position].args
                for i, sample_steps in enumerate(steps)
                if len(sample_steps) > position and sample_steps[position].op == name
            }
            if not drawn:
                continue
            rows = on_device(list(drawn), images.device)
            others = [(i + 1 + int(args["partner"] * (count - 1))) % count for i, args in drawn.items()]
            partners = on_device(others, images.device)
            mixed, weights = op.on_batch([dict(args) for args in drawn.values()], before[rows], before[partners])
            soft = torch.lerp(labels[partners], labels[rows], weights.to(labels.dtype).unsqueeze(1))
            images = images.to(mixed.dtype) if mixed.is_floating_point() else images
            images = images.index_copy(0, rows, mixed.to(images.dtype))
            targets = targets.index_copy(0, rows, soft)
    return images, targets


def _can_join(first: Pass, other: Pass) -> bool:
    """Whether two passes can run in one batched call."""
    if isinstance(first, WarpPass) and isinstance(other, WarpPass):
        same = first.size == other.size and first.border == other.border and first.interpolation == other.interpolation
        return same and first.shrink() == other.shrink()
    if isinstance(first, OpPass) and isinstance(other, OpPass):
        return first.op is other.op
    return type(first) is type(other)


def _run_pass(passes: Sequence[Pass], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    first = passes[0]
    if isinstance(first, WarpPass):
        warps = [item for item in passes if isinstance(item, WarpPass)]
        return _warp(warps, parts) if first.interpolation == "bilinear" else _warp_on_cpu(warps, parts)
    images = torch.stack(list(parts))
    if isinstance(first, ColorPass):
        return _recolor([item for item in passes if isinstance(item, ColorPass)], images)
    if isinstance(first, TablePass):
        return _look_up([item for item in passes if isinstance(item, TablePass)], images)
    if isinstance(first, HsvHuePass):
        return _rotate_hue([item for item in passes if isinstance(item, HsvHuePass)], images)
    if isinstance(first, BlendPass):
        return _blend([item for item in passes if isinstance(item, BlendPass)], images)
    return first.op.on_batch([item.args for item in passes if isinstance(item, OpPass)], images)


def _blend(passes: Sequence[BlendPass], images: torch.Tensor) -> torch.Tensor:
    total = images.float() * column(images, [item.image_weight for item in passes])
    for position in range(max(len(item.chains) for item in passes)):
        rows = [i for i, item in enumerate(passes) if len(item.chains) > position]
        weights, chains = zip(*(passes[i].chains[position] for i in rows), strict=True)
        chosen = on_device(rows, images.device)
        results = torch.stack(_run_all([list(chain) for chain in chains], images[chosen].unbind(0))).float()
        total.index_add_(0, chosen, results * column(images, weights))
    return to_uint8(total)


def _warp(passes: Sequence[WarpPass], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Resample each image by its pass. The images' sizes may differ; the grids of all are computed together."""
    first, device = passes[0], parts[0].device
    shrink = first.shrink()
    sizes = [(part.shape[1], part.shape[2]) for part in parts]
    reduced = [(-(-height // shrink[0]), -(-width // shrink[1])) for height, width in sizes]
    grid = _grid(passes, reduced, shrink, device)
    limits = [_bounds(item, *both) for item, *both in zip(passes, sizes, reduced, strict=True)]
    if any(math.isfinite(limit) for bounds in limits for limit in bounds):
        clamps = on_device(limits, device, torch.float32)
        lowest, highest = clamps[:, None, None, :2], clamps[:, None, None, 2:]
        grid = torch.minimum(torch.maximum(grid, lowest), highest)
    # grid_sample pads with zeros: subtract the fill before and add it after, so that the padding becomes the fill.
    fill = on_device([item.fill for item in passes], device, torch.float32).view(-1, 3, 1, 1)
    groups = _by_shape(parts)
    if len(groups) == 1:
        return to_uint8(_sample(torch.stack(list(parts)).float(), grid, fill, shrink, first.border) + fill)
    sampled: dict[int, torch.Tensor] = {}
    for rows in groups:
        results = _sample(_rows(parts, rows).float(), _rows(grid, rows), _rows(fill, rows), shrink, first.border)
        sampled.update(zip(rows, results, strict=True))
    return to_uint8(torch.stack([sampled[row] for row in range(len(parts))]) + fill)


def _grid(
    passes: Sequence[WarpPass], sizes: Sequence[tuple[int, int]], shrink: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Return float32 N×H'×W'×2: where each output pixel reads, in grid_sample's coordinates: −1 left and top, 1 right and bottom.

    sizes: (height, width) of each image after the box filter of `shrink`.
    """
    first = passes[0]
    matrices = np.array([item.matrix for item in passes]).reshape(-1, 3, 3)
    if max(shrink) > 1:
        matrices = np.diag([1 / shrink[1], 1 / shrink[0], 1.0]) @ matrices
    to_grid = np.array([[[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]] for height, width in sizes])
    matrix = on_device(to_grid @ matrices, device, torch.float32)
    y = torch.arange(first.size[0], device=device, dtype=torch.float32) + 0.5
    x = torch.arange(first.size[1], device=device, dtype=torch.float32) + 0.5
    rows = 3 if any(item.is_perspective for item in passes) else 2
    grid = (
        matrix[:, None, None, :rows, 0] * x[None, None, :, None]
        + matrix[:, None, None, :rows, 1] * y[None, :, None, None]
        + matrix[:, None, None, :rows, 2]
    )
    return grid[..., :2] / grid[..., 2:] if rows == 3 else grid


def _sample(
    pixels: torch.Tensor, grid: torch.Tensor, fill: torch.Tensor, shrink: tuple[int, int], border: str
) -> torch.Tensor:
    """Return float32 M×3×H'×W' minus `fill`: pixels (float32 M×3×H×W), reduced by a box filter, at the points of the grid."""
    vertical, horizontal = shrink
    if vertical > 1 or horizontal > 1:
        below, right = -pixels.shape[2] % vertical, -pixels.shape[3] % horizontal
        pixels = F.avg_pool2d(F.pad(pixels, (0, right, 0, below), mode="replicate"), (vertical, horizontal))
    if border == "reflect101":
        height, width = pixels.shape[2:]
        grid = torch.stack([_reflect(grid[..., 0], width), _reflect(grid[..., 1], height)], -1)
    return F.grid_sample(pixels - fill, grid, mode="bilinear", padding_mode=_PADDING[border], align_corners=False)


def _by_shape(parts: Sequence[torch.Tensor]) -> list[list[int]]:
    """Return the indices of the parts, in groups of one shape."""
    groups: dict[torch.Size, list[int]] = {}
    for index, part in enumerate(parts):
        groups.setdefault(part.shape, []).append(index)
    return list(groups.values())


def _rows(values: torch.Tensor | Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
    """Return the rows in one tensor, without a copy of their indices to the device."""
    return values[rows[0]][None] if len(rows) == 1 else torch.stack([values[row] for row in rows])


def _warp_on_cpu(passes: Sequence[WarpPass], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Run bicubic warps, and those of another library, image by image on the CPU.

    grid_sample cannot repeat a crop's last pixels within a cubic's reach.
    """
    results: dict[int, np.ndarray] = {}
    for rows in _by_shape(parts):  # one copy from the device for each shape
        arrays = _rows(parts, rows).permute(0, 2, 3, 1).cpu().numpy()
        results.update((row, cpu.run([passes[row]], array)) for row, array in zip(rows, arrays, strict=True))
    stacked = np.stack([results[row] for row in range(len(parts))])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).to(parts[0].device)


def _reflect(at: torch.Tensor, length: int) -> torch.Tensor:
    """Reflect grid_sample coordinates about the centres of the first and the last of `length` pixels."""
    if length == 1:
        return torch.zeros_like(at)
    folded = ((at + 1) * (length / 2) - 0.5).remainder(2 * (length - 1))
    return (2 * torch.minimum(folded, 2 * (length - 1) - folded) + 1) / length - 1


def _bounds(item: WarpPass, size: tuple[int, int], shrunk: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return (lowest x, lowest y, highest x, highest y) that the pass may sample, in grid_sample's −1 … 1; ±inf for no limit.

    A resized crop inside the image is limited to the centres of the crop's outermost pixels. Another warp is limited to those of the
    image, at the edges beyond which it shows nothing.
    size: (height, width) of the image. shrunk: the size after the box filter.
    """
    height, width = shrunk
    down, across = item.inside(size)
    if not down and not across:
        return -math.inf, -math.inf, math.inf, math.inf
    box = item.shown_box()
    if box is None or shrunk != size or not (down and across):
        box = (0, height, 0, width)
    top, bottom, left, right = box
    return (
        (2 * left + 1) / width - 1 if across else -math.inf,
        (2 * top + 1) / height - 1 if down else -math.inf,
        (2 * right - 1) / width - 1 if across else math.inf,
        (2 * bottom - 1) / height - 1 if down else math.inf,
    )


def _recolor(passes: Sequence[ColorPass], images: torch.Tensor) -> torch.Tensor:
    pixels = images.float()
    parts = on_device(np.stack([_by_mean(item) for item in passes]), images.device)
    means = pixels.mean((2, 3)).double()
    offsets = parts[:, :, 3] + (parts[:, :, 4:] @ means.unsqueeze(2)).squeeze(2)
    matrix, offset = parts[:, :, :3].float(), offsets.float()[:, :, None, None]
    return to_uint8(torch.einsum("nij,njhw->nihw", matrix, pixels) + offset)


def _by_mean(item: ColorPass) -> np.ndarray:
    """Return 3×7 float64: the pass's matrix, its offset for a mean of 0, and the slope of the offset by each channel's mean.

    The means stay on the device: reading them would synchronise. Contrast's offset is linear in them.
    """
    fixed = item.matrix(np.zeros(3))
    slopes = np.zeros((3, 3))
    if item.needs_mean:
        slopes = np.stack([item.matrix(unit)[:, 3] - fixed[:, 3] for unit in np.eye(3)], axis=1)
    return np.concatenate([fixed, slopes], axis=1)


def _look_up(passes: Sequence[TablePass], images: torch.Tensor) -> torch.Tensor:
    count = images.shape[0]
    flat = images.reshape(count, 3, -1).long()
    histograms = np.zeros((count, 3, 256), np.int64)
    if any(item.needs_histogram for item in passes):
        ones = torch.ones((), dtype=torch.int64, device=images.device).expand(flat.shape)
        counts = torch.zeros(count, 3, 256, dtype=torch.int64, device=images.device).scatter_add_(2, flat, ones)
        histograms = counts.cpu().numpy()
    tables = np.stack([item.table(histogram) for item, histogram in zip(passes, histograms, strict=True)])
    return on_device(tables, images.device).gather(2, flat).view(images.shape)


def _rotate_hue(passes: Sequence[HsvHuePass], images: torch.Tensor) -> torch.Tensor:
    pixels = images.float()
    high, low = pixels.amax(1), pixels.amin(1)
    spread = high - low
    red, green, blue = pixels.unbind(1)
    safe = spread.clamp(min=1e-6)
    sector = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turns = on_device([item.turns for item in passes], images.device, torch.float32).view(-1, 1, 1)
    sector = (sector + 6 * turns) % 6
    # Each channel is the maximum minus the spread times the hue's distance from the channel (Smith 1978, without case distinctions).
    away = torch.stack([(sector + shift) % 6 for shift in (5, 3, 1)], 1)
    part = torch.minimum(away, 4 - away).clamp(0, 1)
    return to_uint8(high.unsqueeze(1) - spread.unsqueeze(1) * part)
