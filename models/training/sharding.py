"""Shards of a network over the ranks (FSDP): each rank holds a part of every weight, its gradient and the optimizer's state.

Source: Zhao et al. 2023, arXiv:2304.11277; PyTorch's `fully_shard`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from refract.models.training.activation_checkpointing import repeated_blocks


def shard(network: nn.Module, mesh: Any) -> None:
    """Divide the weights of the network among the ranks of the mesh, in place. A forward pass collects them block by block."""
    from torch.distributed.fsdp import fully_shard

    network.to(memory_format=torch.contiguous_format)  # else `fully_shard` rejects it
    for block in repeated_blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(value: Tensor) -> Tensor:
    """Return the whole tensor of a sharded one, on the CPU; another tensor as it is. Every rank must call it."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def part_of_rank(value: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this rank has, which may be empty; another tensor as it is."""
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value


def sharded_as(value: Tensor, like: Tensor | None) -> Tensor:
    """Return a whole tensor sharded as `like`; unchanged if `like` is not sharded. Every rank must call it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
