"""LoRA: low-rank adapters of the attention projections, trained in place of the weights and merged into them afterwards.

Source: Hu et al. 2021, arXiv:2106.09685. The adapters are those of the library peft, which is imported on first use. Independent of
configs.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from refract.models.head import head_of

log = logging.getLogger(__name__)

ADAPTER = ".lora_"
"""Part of the names of an adapter's parameters in peft."""


def add_adapters(network: nn.Module, inputs: Sequence[Any], *, rank: int, alpha: int) -> nn.Module:
    """Add adapters to the attention projections, in place, and freeze everything else but the head. Returns the network.

    The projections are the linear layers in modules named …Attention that a forward pass calls. Each gets W + alpha / rank · B A, with a
    random A (rank, inputs) and B (outputs, rank) of zeros, so that the outputs do not change. A projection of queries, keys and values in
    one layer gets one adapter.

    inputs: arguments of one forward pass. ValueError without the package peft, and for a network, or a branch of a multimodal network,
    without such layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as err:
        raise ValueError(
            f"mode='lora' needs the package peft ({err}); install it with `pip install 'refract[lora]'`"
        ) from err
    branches: list[nn.Module] = getattr(network, "branches", lambda: [network])()
    called = _called_projections(network, inputs)
    for branch in branches:
        if not any(module in called.values() for module in branch.modules()):
            raise ValueError(
                f"mode='lora': {type(branch).__name__} has no attention layers that LoRA can adapt; use a transformer of timm, such as "
                "timm/vit_small_patch16_224, timm/deit_small_patch16_224 or timm/swin_tiny_patch4_window7_224, or mode: fine-tune"
            )
    head = head_of(network)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(called)), network)
    for parameter in [*head.parameters(), *(network.parameters(recurse=False) if branches != [network] else ())]:
        parameter.requires_grad_(True)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    log.info(
        "LoRA: %d adapters of rank %d; %s of %s parameters are trained", len(called), rank, f"{trained:,}", f"{total:,}"
    )
    return network


def _called_projections(network: nn.Module, inputs: Sequence[Any]) -> Mapping[str, nn.Linear]:
    """Return name → linear layer of the attention modules that a forward pass calls.

    Some attention modules read only the layer's weight, and would skip an adapter.
    """
    linear = {
        f"{name}.{child}": layer
        for name, module in network.named_modules()
        if "Attention" in type(module).__name__
        for child, layer in module.named_children()
        if isinstance(layer, nn.Linear)
    }
    called: set[str] = set()
    hooks = [layer.register_forward_hook(lambda *_, name=name: called.add(name)) for name, layer in linear.items()]
    training = network.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            network.eval()(*inputs)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return {name: linear[name] for name in sorted(called)}


def merge_adapters(module: nn.Module) -> nn.Module:
    """Merge every adapter into its weight, in place, so that the module has its former layers and keys. Returns the module."""
    for name, layer in list(module.named_modules()):
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.base_layer)
    return module


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with the adapters merged into their weights. The module keeps its adapters."""
    state = module.state_dict()
    return merge_adapters(copy.deepcopy(module)).state_dict() if any(ADAPTER in key for key in state) else state
