"""Activations that the backward pass computes again: less memory for about a third more time."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute_activations(network: nn.Module) -> int:
    """Let the network keep only what enters each of its blocks in training, in place, and compute the rest again; returns the blocks.

    A block is what a sequence of the network holds: a residual block, a transformer layer; a sequence of single layers is cut into about
    √n parts. Results, gradients and keys of the weights stay as they are, and so do the statistics of batch norms, which the second pass
    leaves alone. ValueError where the network has no sequence. Source: Chen et al. 2016, arXiv:1604.06174, section 4.
    """
    blocks = list(_blocks(network))
    for block in blocks:
        vars(block)["forward"] = partial(_recomputed, block.forward, block)
    count = len(blocks)
    for sequence in _plain_sequences(network):
        parts = _parts(list(sequence))
        vars(sequence)["forward"] = partial(_in_turn, [partial(_recomputed, part, part) for part in parts])
        count += len(parts)
    if not count:
        raise ValueError(
            f"{type(network).__name__} has no sequence of blocks whose activations could be computed again"
        )
    return count


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parts of their own that stand in a sequence; of a sequence of sequences, the innermost."""
    for child in module.children():
        if _is_sequence(module) and not (_is_sequence(child) and any(_has_parts(part) for part in child.children())):
            if _has_parts(child):
                yield child
        else:
            yield from _blocks(child)


def _plain_sequences(network: nn.Module) -> list[nn.Sequential]:
    """Sequences of four or more single layers that are in no block."""
    inside = {id(part) for block in _blocks(network) for part in block.modules()}
    sequences = [m for m in network.modules() if isinstance(m, nn.Sequential) and id(m) not in inside]
    return [sequence for sequence in sequences if len(sequence) >= 4 and not any(map(_has_parts, sequence))]


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList)


def _has_parts(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _parts(layers: list[nn.Module]) -> list[nn.Sequential]:
    length = round(math.sqrt(len(layers)))
    return [nn.Sequential(*layers[k : k + length]) for k in range(0, len(layers), length)]


def _in_turn(parts: list[Callable[..., Any]], values: Tensor) -> Tensor:
    for part in parts:
        values = part(values)
    return values


def _recomputed(forward: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts = partial(_contexts, module)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the first and of the second pass."""
    return nullcontext(), statistics_kept(module)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch, but do not count it once more."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
    kept = [(n.momentum, None if n.num_batches_tracked is None else n.num_batches_tracked.clone()) for n in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            if count is not None:
                norm.num_batches_tracked = count
