"""The batch executor: plans on a uint8 N×3×H×W tensor on any device, each sample its own. Same plan, same picture as the cpu executor,
within rounding. The only module of `augment` that needs PyTorch."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from augment.fuse import ColorPass, OpPass, Pass, WarpPass, batch_steps, fuse
from augment.ops.mix import MIX
from augment.plan import Plan

_PADDING = {"constant": "zeros", "edge": "border", "reflect": "reflection"}


def run(plans: Sequence[Plan], images: torch.Tensor) -> torch.Tensor:
    """Apply plans[i] to images[i]; batch ops (MixUp, CutMix) are left to `mix`.

    images: uint8 N×3×H×W, not changed. Returns a new uint8 tensor N×3×H'×W' on the same device. ValueError where the plans were
    drawn for another size, or end in several sizes.
    """
    size = tuple(images.shape[-2:])
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(plans) != images.shape[0]:
        raise ValueError(f"expected {len(plans)} pictures as uint8 N×3×H×W, got {images.dtype} {tuple(images.shape)}")
    wrong = [i for i, plan in enumerate(plans) if plan.size != size]
    if wrong:
        raise ValueError(f"plan {wrong[0]} was drawn for {plans[wrong[0]].size}, the pictures have {size}")
    left = [fuse(plan) for plan in plans]
    # Samples differ in which ops they drew, so each round runs one pass of every sample that comes to the same kind next.
    parts: list[torch.Tensor] = list(images.unbind(0))
    while any(left):
        first = next(passes[0] for passes in left if passes)
        chosen = [
            i
            for i, passes in enumerate(left)
            if passes and _alike(passes[0], first) and parts[i].shape == parts[_first(left)].shape
        ]
        results = _run_pass([left[i].pop(0) for i in chosen], torch.stack([parts[i] for i in chosen]))
        for i, result in zip(chosen, results, strict=True):
            parts[i] = result
    sizes = {tuple(part.shape[1:]) for part in parts}
    if len(sizes) > 1:
        raise ValueError(
            f"the plans end in pictures of several sizes {sorted(sizes)}; end the policy in one, or give Augmenter a size"
        )
    return torch.stack(parts)


def mix(plans: Sequence[Plan], images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the plans' batch ops, in the policy's order, to pictures (any dtype in 0…255) and float targets N×C alike.

    A batch of one has no partner and comes back as it is. Inputs are not changed. ValueError for targets that are not float N×C.
    """
    count = images.shape[0]
    if targets.ndim != 2 or targets.shape[0] != count or not targets.is_floating_point():
        raise ValueError(
            f"targets: expected float N×C for {count} pictures, got {targets.dtype} {tuple(targets.shape)}"
        )
    steps = batch_steps(plans)
    if count < 2:
        return images, targets
    for name, op in MIX.items():
        drawn = {i: step.args for i, own in enumerate(steps) for step in own if step.op == name}
        if not drawn:
            continue
        rows = torch.tensor(list(drawn), device=images.device)
        others = [(i + 1 + int(args["partner"] * (count - 1))) % count for i, args in drawn.items()]
        partners = torch.tensor(others, device=images.device)
        mixed, kept = op.on_batch([dict(args) for args in drawn.values()], images[rows], images[partners])
        soft = torch.lerp(targets[partners], targets[rows], kept.to(targets.dtype).unsqueeze(1))
        images = images.to(mixed.dtype) if mixed.is_floating_point() else images
        images = images.index_copy(0, rows, mixed.to(images.dtype))
        targets = targets.index_copy(0, rows, soft)
    return images, targets


def _first(left: list[list[Pass]]) -> int:
    return next(i for i, passes in enumerate(left) if passes)


def _alike(one: Pass, other: Pass) -> bool:
    """Whether two passes can run together."""
    if isinstance(one, WarpPass) and isinstance(other, WarpPass):
        return one.size == other.size and one.border == other.border and one.shrink() == other.shrink()
    if isinstance(one, OpPass) and isinstance(other, OpPass):
        return one.op is other.op
    return isinstance(one, ColorPass) and isinstance(other, ColorPass)


def _run_pass(passes: Sequence[Pass], images: torch.Tensor) -> torch.Tensor:
    first = passes[0]
    if isinstance(first, WarpPass):
        return _warp([item for item in passes if isinstance(item, WarpPass)], images)
    if isinstance(first, ColorPass):
        return _recolor([item for item in passes if isinstance(item, ColorPass)], images)
    return first.op.on_batch([item.args for item in passes if isinstance(item, OpPass)], images)


def _warp(passes: Sequence[WarpPass], images: torch.Tensor) -> torch.Tensor:
    first = passes[0]
    vertical, horizontal = first.shrink()
    pixels = images.float()
    matrices = np.stack([item.matrix for item in passes])
    if vertical > 1 or horizontal > 1:
        below, beside = -pixels.shape[2] % vertical, -pixels.shape[3] % horizontal
        pixels = F.avg_pool2d(F.pad(pixels, (0, beside, 0, below), mode="replicate"), (vertical, horizontal))
        matrices = np.diag([1 / horizontal, 1 / vertical, 1.0]) @ matrices
    height, width = pixels.shape[2:]
    # grid_sample counts from −1 at the left edge to 1 at the right edge.
    matrices = np.array([[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]]) @ matrices
    matrix = torch.tensor(matrices[:, :2], dtype=torch.float32, device=images.device)
    y = torch.arange(first.size[0], device=images.device, dtype=torch.float32) + 0.5
    x = torch.arange(first.size[1], device=images.device, dtype=torch.float32) + 0.5
    grid = (
        matrix[:, None, None, :, 0] * x[None, None, :, None]
        + matrix[:, None, None, :, 1] * y[None, :, None, None]
        + matrix[:, None, None, :, 2]
    )
    # Zeros beyond the edge become the fill where the fill is the zero.
    fill = torch.tensor([item.fill for item in passes], dtype=torch.float32, device=images.device).view(-1, 3, 1, 1)
    sampled = F.grid_sample(
        pixels - fill, grid, mode="bilinear", padding_mode=_PADDING[first.border], align_corners=False
    )
    return _to_uint8(sampled + fill)


def _recolor(passes: Sequence[ColorPass], images: torch.Tensor) -> torch.Tensor:
    pixels = images.float()
    means = pixels.mean((2, 3)).double().cpu().numpy()
    matrices = np.stack([item.matrix(mean) for item, mean in zip(passes, means, strict=True)])
    matrix = torch.tensor(matrices, dtype=torch.float32, device=images.device)
    return _to_uint8(torch.einsum("nij,njhw->nihw", matrix[:, :, :3], pixels) + matrix[:, :, 3, None, None])


def _to_uint8(values: torch.Tensor) -> torch.Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)
