"""Explain a plan on one image: which steps each pass fuses, and the duration of each pass."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from refract.augment.decoding.decode import decode, image_size
from refract.augment.executors import cpu
from refract.augment.executors.encoded import decode_for
from refract.augment.fuse import fuse_with_steps
from refract.augment.passes import BlendPass, ColorPass, OpPass, Pass, TablePass, WarpPass
from refract.augment.plan import Plan, Step


@dataclass(frozen=True)
class Stage:
    """One pass, or the decoding.

    name: kind of pass. steps: the plan's steps that it executes. detail: its numbers. seconds: median of the repetitions.
    """

    name: str
    steps: tuple[Step, ...]
    detail: str
    seconds: float


def explain(plan: Plan, data: bytes, *, repeats: int = 30) -> list[Stage]:
    """Return the stages of `Augmenter.apply(plan, data)`, decoding first. repeats: timed runs per stage. ImageError as `decode`."""
    size = image_size(data)
    fused = fuse_with_steps(plan)
    passes = [item for item, _ in fused]
    remaining, pixels = decode_for(passes, data, size)
    whole = _seconds(lambda: decode(data), repeats)
    detail = f"{pixels.shape[0]}×{pixels.shape[1]} of {size[0]}×{size[1]}; the whole image takes {1e3 * whole:.2f} ms"
    stages = [Stage("decode", (), detail, _seconds(lambda: decode_for(passes, data, size), repeats))]
    for item, (_, steps) in zip(remaining, fused, strict=True):
        run = partial(cpu.run_pass, item, pixels)
        name, detail = _describe(item)
        stages.append(Stage(name, steps, detail, _seconds(run, repeats)))
        pixels = run()
    return stages


def _seconds(work: Callable[[], Any], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)


def _describe(item: Pass) -> tuple[str, str]:
    if isinstance(item, WarpPass):
        height, width = item.size
        shrink = item.shrink()
        box_filter = f", after a box filter of {shrink[0]}×{shrink[1]}" if shrink != (1, 1) else ""
        return "resampling", f"to {height}×{width}{box_filter}"
    if isinstance(item, ColorPass):
        return "colour matrix", "3×4"
    if isinstance(item, TablePass):
        return "table", "256 entries a channel" + (", from the histogram" if item.needs_histogram else "")
    if isinstance(item, OpPass):
        return item.op.kind, ""
    if isinstance(item, BlendPass):
        return "blend", f"{len(item.chains)} chains of ops"
    return "hue in HSV", ""
