"""Choose how many images of the test set robustness is measured on, so that it costs at most a third of the training.

The choice is a function of sizes, not of a clock: two equal runs measure the same. The constants are processor milliseconds of one core,
measured with `refract.augment.ops.corruption` and the presets at 32², 64² and 224² on an AMD EPYC; they only have to hold in proportion.
"""

from collections.abc import Callable
from dataclasses import replace

from refract.pipeline.evaluation.robustness import QUICK, Effort

SHARE = 1 / 3
FEWEST, MOST = 20, 200
"""Images. On fewer the interval of the error is about ±0.15, which says little; more than MOST is what `full` is for."""

LOADING = (0.1, 0.02)
"""Milliseconds to decode and augment a training image: for the image, and for each 1,000 pixels of the network's input."""

CORRUPTING = (0.25, 0.14)
"""The same for a corruption, in the mean of all corruptions and severities."""

FLOPS = 1e8
"""Floating-point operations of a forward pass in a millisecond of one core: more than eager PyTorch reaches, so that the network's
time, of which a training has more, is not overestimated."""


def affordable(*, seen: int, available: int, pixels: int, flops: float) -> Effort | None:
    """The effort that costs at most SHARE of the training; None where that is fewer than FEWEST images.

    seen: images that went through the training, each epoch's counted again; available: images of the test set; pixels: of the network's
    input; flops: of one image's forward pass, 0 on a GPU. A training image is taken to cost a single forward pass, not the three of
    forward and backward: training may compute in bf16, while robustness is measured in fp32.
    """
    network = flops / FLOPS
    training, measuring = (network + fixed + rate * pixels / 1000 for fixed, rate in (LOADING, CORRUPTING))
    count = min(MOST, available, int(SHARE * seen * training / (QUICK.passes * measuring)))
    return replace(QUICK, images=count) if count >= min(FEWEST, max(1, available)) else None


def flops_of(forward: Callable[[], object]) -> int:
    """Floating-point operations of the call's matrix products, convolutions and attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()
