"""Choose how many test images the robustness measurement uses, so that it costs at most a third of the training.

The choice depends on sizes, not on a clock, so that two equal runs measure the same. The constants are CPU milliseconds of one core,
measured with `refract.augment.ops.corruption` and the presets at 32², 64² and 224² on an AMD EPYC. Only their ratios matter.
"""

from collections.abc import Callable
from dataclasses import replace

from refract.pipeline.evaluation.robustness import QUICK, Effort

COST_RATIO = 1 / 3
FEWEST, MOST = 20, 200
"""Numbers of images. Below FEWEST the interval of the error is about ±0.15, too wide to be useful; `full` measures more than MOST."""

LOADING = (0.1, 0.02)
"""Milliseconds to decode and augment a training image: per image, and per 1,000 pixels of the network's input."""

CORRUPTING = (0.25, 0.14)
"""Milliseconds to corrupt an image, the mean over all corruptions and severities: per image, and per 1,000 pixels."""

FLOPS = 1e8
"""Floating-point operations of a forward pass per millisecond of one core. Eager PyTorch reaches fewer, so the time of the network, of
which a training has more, is not overestimated."""


def affordable(*, seen: int, available: int, pixels: int, flops: float) -> Effort | None:
    """Return the effort that costs at most COST_RATIO of the training, or None if that is fewer than FEWEST images.

    seen: training images, counted once per epoch; available: images of the test set; pixels: the pixels of the network's input; flops: the
    flops of one image's forward pass, 0 on a GPU. A training image counts as one forward pass, not as the three of forward and backward,
    because training may compute in bf16 and robustness is measured in fp32.
    """
    network = flops / FLOPS
    training, measuring = (network + fixed + rate * pixels / 1000 for fixed, rate in (LOADING, CORRUPTING))
    count = min(MOST, available, int(COST_RATIO * seen * training / (QUICK.passes * measuring)))
    return replace(QUICK, images=count) if count >= min(FEWEST, max(1, available)) else None


def flops_of(forward: Callable[[], object]) -> int:
    """Count the floating-point operations of the call's matrix products, convolutions and attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()
