"""Values of all ranks of a training; with one rank, the value of this process."""

import io
from typing import TypeVar

import torch
import torch.distributed
from torch import nn

Value = TypeVar("Value")


def values_of_ranks(value: Value) -> list[Value]:
    """Return the value of each rank, in their order. Every rank must call it. value: what a checkpoint may hold, such as tensors."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    stored = [b""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(stored, buffer.getvalue())
    return [torch.load(io.BytesIO(content), map_location="cpu", weights_only=True) for content in stored]


def copy_buffers_of_rank_0(module: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, such as running statistics of batch norms, in place. Every rank must call it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
