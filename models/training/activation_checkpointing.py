"""Activation checkpointing: the backward pass recomputes activations, which saves memory for about a third more time."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute_activations(network: nn.Module) -> int:
    """Make the network store only the inputs of its blocks in training and recompute the rest, in place. Returns the number of blocks.

    A block is an item of a sequence: a residual block or a transformer layer. A sequence of n single layers is split into about √n
    segments. Results, gradients, state dict keys and batch norm statistics do not change: the second pass does not update the statistics.
    ValueError if the network has no sequence. Source: Chen et al. 2016, arXiv:1604.06174, section 4.
    """
    blocks = repeated_blocks(network)
    for block in blocks:
        vars(block)["forward"] = partial(_checkpointed, block.forward, block)
    count = len(blocks)
    for sequence in _plain_sequences(network):
        segments = _segments(list(sequence))
        vars(sequence)["forward"] = partial(
            _in_turn, [partial(_checkpointed, segment, segment) for segment in segments]
        )
        count += len(segments)
    if not count:
        raise ValueError(f"{type(network).__name__} has no sequence of blocks whose activations can be recomputed")
    return count


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network: residual blocks, transformer layers."""
    return list(_blocks(network))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost sequence items that have submodules. In nested sequences they are the items of the innermost one."""
    for child in module.children():
        if _is_sequence(module) and not (_is_sequence(child) and any(map(_has_children, child.children()))):
            if _has_children(child):
                yield child
        else:
            yield from _blocks(child)


def _plain_sequences(network: nn.Module) -> list[nn.Sequential]:
    """List the sequences of four or more single layers outside all blocks."""
    inside = {id(module) for block in _blocks(network) for module in block.modules()}
    sequences = [m for m in network.modules() if isinstance(m, nn.Sequential) and id(m) not in inside]
    return [sequence for sequence in sequences if len(sequence) >= 4 and not any(map(_has_children, sequence))]


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList)


def _has_children(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _segments(layers: list[nn.Module]) -> list[nn.Sequential]:
    length = round(math.sqrt(len(layers)))
    return [nn.Sequential(*layers[k : k + length]) for k in range(0, len(layers), length)]


def _in_turn(segments: list[Callable[..., Any]], values: Tensor) -> Tensor:
    for segment in segments:
        values = segment(values)
    return values


def _checkpointed(forward: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts = partial(_contexts, module)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the context managers of the first pass and of the recomputation."""
    return nullcontext(), frozen_batch_statistics(module)


@contextmanager
def frozen_batch_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms within the block; in training they still normalise by the batch."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
    saved = [(n.momentum, None if n.num_batches_tracked is None else n.num_batches_tracked.clone()) for n in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, saved, strict=True):
            norm.momentum = momentum
            if count is not None:
                norm.num_batches_tracked = count
