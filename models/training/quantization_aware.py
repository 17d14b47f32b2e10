"""Quantisation-aware training: the forward pass rounds weights and activations as a network of 8-bit integers does.

The gradients pass through the rounding (straight-through estimator). The parameters stay in float32, and their names do not change.
Source: Jacob et al. 2018, arXiv:1712.05877, section 3; Krishnamoorthi 2018, arXiv:1806.08342, section 3.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

WEIGHT_LEVELS = 63
"""Largest magnitude of a rounded weight: of 7 bits, with which x86 processors without VNNI compute. 8 bits round less."""

ACTIVATION_LEVELS = 255
"""Largest rounded activation: 8 bits without a sign."""

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
"""Layers whose weights and inputs are rounded."""


@contextmanager
def rounded_forward(network: nn.Module) -> Iterator[int]:
    """Round the weights and inputs of all LAYERS in the forward passes of the block. Yields their number.

    Each output channel of the weights has its own scale, symmetric about 0. Each input has one range, from its smallest to its largest
    value in the batch, extended to 0. Ranges are not stored, so a resumed training continues exactly.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, LAYERS)]
    for layer in layers:
        vars(layer)["forward"] = partial(_rounded, layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _rounded(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Run the layer's own forward function on rounded inputs, with rounded weights in place of its parameter."""
    plain: Callable[[nn.Module, Tensor], Tensor] = type(layer).forward
    weight = layer._parameters["weight"]
    assert weight is not None
    layer._parameters["weight"] = round_weights(weight)  # type: ignore[assignment]
    try:
        return plain(layer, round_activations(inputs))
    finally:
        layer._parameters["weight"] = weight


def round_weights(weights: Tensor) -> Tensor:
    """Round each output channel, dimension 0, to multiples of its largest magnitude / WEIGHT_LEVELS. weights: float, any shape."""
    values = weights.float()
    largest = values.detach().abs().flatten(1).amax(dim=1)
    scale = (largest / WEIGHT_LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(values, scale, zero, 0, -WEIGHT_LEVELS, WEIGHT_LEVELS).to(
        weights.dtype
    )


def round_activations(activations: Tensor) -> Tensor:
    """Round to ACTIVATION_LEVELS + 1 equal steps from the smallest to the largest value, and to 0. Returns the same shape and dtype."""
    values = activations.float()
    low, high = torch.aminmax(values.detach())
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / ACTIVATION_LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low / scale).round().to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, ACTIVATION_LEVELS).to(activations.dtype)
