"""Quantisation-aware training: the forward pass rounds weights and activations as a network of 8-bit integers does.

The gradients pass through the rounding (straight-through estimator). The parameters stay in float32, and their names do not change.
Source: Jacob et al. 2018, arXiv:1712.05877, section 3; Krishnamoorthi 2018, arXiv:1806.08342, section 3.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

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
    value in the batch, extended to 0. Ranges are not stored, so a resumed training continues exactly. Attention that computes with the
    weights of its layers instead of calling them, such as PyTorch's and torchvision's, has rounded weights, and inputs in float32.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, LAYERS)]
    patched: list[nn.Module] = []
    for module in network.modules():
        weights = _weights_of(module)
        if isinstance(module, LAYERS):
            forward: Callable[..., Any] = partial(_run_layer, module, module.forward)
        # A module with a patched forward function recomputes activations; its layers round their weights themselves.
        elif weights and "forward" not in vars(module):
            forward = partial(_run_with, weights, module.forward)
        else:
            continue
        vars(module)["forward"] = forward
        patched.append(module)
    try:
        yield len(layers)
    finally:
        for module in patched:
            del vars(module)["forward"]


def _weights_of(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """List the weights that a module may read without a call of the layer: those of its children, and joint projections of attention."""
    weights = [(child, "weight") for child in module.children() if isinstance(child, LAYERS)]
    return weights + [(module, name) for name in ("in_proj_weight",) if module._parameters.get(name) is not None]


def _run_layer(layer: nn.Module, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return _run_with([(layer, "weight")], forward, round_activations(inputs))


def _run_with(weights: list[tuple[nn.Module, str]], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a forward function with rounded weights in place of the parameters; those that are rounded already stay."""
    plain = [(owner, name, owner._parameters[name]) for owner, name in weights]
    plain = [entry for entry in plain if isinstance(entry[2], nn.Parameter)]
    try:
        for owner, name, parameter in plain:
            assert parameter is not None
            owner._parameters[name] = round_weights(parameter)  # type: ignore[assignment]
        return forward(*args, **kwargs)
    finally:
        for owner, name, parameter in plain:
            owner._parameters[name] = parameter


def round_weights(weights: Tensor) -> Tensor:
    """Round each output channel, dimension 0, to multiples of its largest magnitude / WEIGHT_LEVELS. weights: float, any shape."""
    values = weights.float()
    largest = values.detach().abs().flatten(1).amax(dim=1)
    scale = (largest / WEIGHT_LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    rounded = torch.fake_quantize_per_channel_affine(values, scale, zero, 0, -WEIGHT_LEVELS, WEIGHT_LEVELS)
    return rounded.to(weights.dtype)


def round_activations(activations: Tensor) -> Tensor:
    """Round to ACTIVATION_LEVELS + 1 equal steps from the smallest to the largest value, and to 0. Returns the same shape and dtype."""
    values = activations.float()
    low, high = torch.aminmax(values.detach())
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / ACTIVATION_LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low / scale).round().to(torch.int32)
    rounded = torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, ACTIVATION_LEVELS)
    return rounded.to(activations.dtype)
