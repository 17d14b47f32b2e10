"""Backends of PyTorch: float32, bfloat16, float16, and torch.compile."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refract.models.conversion.instruction_sets import capabilities
from refract.models.features import FeatureClassifier
from refract.serve.runtime.backends.base import Backend, Forward


def channels_last(network: nn.Module) -> nn.Module:
    """Convert the weights of `network` in place to channels-last, the memory order of an image, and return it.

    A CPU then does not reorder each image. Networks with 3-D convolutions have five-dimensional weights and stay unchanged.
    """
    if all(parameter.dim() != 5 for parameter in network.parameters()):
        network.to(memory_format=torch.channels_last)
    return network


def _eager(network: FeatureClassifier, images: Tensor, folder: Path) -> Forward:
    return network


def half(network: FeatureClassifier, images: Tensor, dtype: torch.dtype) -> Forward:
    """Return a copy of the network that computes in `dtype` by autocast, in channels-last memory order."""
    copied = channels_last(copy.deepcopy(network))
    _lower(copied, images[:2], dtype)

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        # A CUDA graph needs the converted weights at each replay, but autocast's cache frees them after the capture.
        with torch.autocast(batch.device.type, dtype, cache_enabled=False):
            logits, embedding = copied(batch)
        return logits.float(), embedding.float()

    return forward


def _lower(network: nn.Module, example: Tensor, dtype: torch.dtype) -> None:
    """Convert those weights to `dtype` that autocast would convert at each call, a fifth of resnet18's time for one image."""
    lowered: list[nn.Module] = []

    def collect(module: nn.Module, _: Any) -> None:
        if torch.is_autocast_enabled(example.device.type):  # False in layers for which the network disables autocast
            lowered.append(module)

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_pre_hook(collect) for layer in layers]
    with torch.autocast(example.device.type, dtype):
        network(example)
    for hook in hooks:
        hook.remove()
    for layer in lowered:
        layer.to(dtype)


def _in(dtype: torch.dtype) -> Callable[[FeatureClassifier, Tensor, Path], Forward]:
    return lambda network, images, folder: half(network, images, dtype)


def _compiled(network: FeatureClassifier, images: Tensor, folder: Path) -> Forward:
    """Compile the network in bfloat16 by torch.compile. Compiled kernels are stored next to `folder` for the next start.

    It needs a C++ compiler on a CPU, or a C compiler on a GPU, and most of a minute at the first start.
    """
    _cache_kernels(folder.parent / "inductor")
    run = torch.compile(channels_last(copy.deepcopy(network)), dynamic=True)

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(batch.device.type, torch.bfloat16):
            logits, embedding = run(batch)
        return logits.float(), embedding.float()

    return forward


def _cache_kernels(folder: Path) -> None:
    """Set `folder` as torch.compile's cache. If it is not writable, torch.compile uses the temporary folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _bf16_is_fast(device: torch.device) -> bool:
    """Return whether the device has instructions for bfloat16. Timing then measures whether they help."""
    return device.type != "cpu" or any(capabilities().get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


BACKENDS = (
    Backend("eager", _eager, ("cpu", "cuda"), embeds=True),
    Backend("bf16", _in(torch.bfloat16), ("cpu", "cuda"), automatic=_bf16_is_fast, embeds=True),
    Backend("fp16", _in(torch.float16), ("cuda",), embeds=True),
    Backend("compiled", _compiled, ("cpu", "cuda"), automatic=lambda device: device.type == "cuda", embeds=True),
)
