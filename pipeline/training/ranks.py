"""The ranks of a training, one per device: on one machine by trainer.devices, on several machines by torchrun."""

import os
from dataclasses import dataclass

from refract.pipeline.config.config import ConfigError


@dataclass(frozen=True)
class Ranks:
    """rank: of this process among all; devices: ranks per machine; nodes: number of machines."""

    rank: int
    devices: int
    nodes: int

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes, tracks and reports."""
        return self.rank == 0

    @property
    def count(self) -> int:
        return self.devices * self.nodes


def is_further_rank() -> bool:
    """Whether Lightning's rank 0 started this process, by its own command line, as a further rank of its training."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "LOCAL_WORLD_SIZE" not in os.environ


def current_ranks(devices: int, device: str) -> Ranks:
    """Read the ranks from torchrun's environment or from Lightning's, else return rank 0 of `devices`.

    device: `cpu` or `cuda`. Raises ConfigError for more ranks than GPUs, or if torchrun started another number of ranks than `devices`.
    """
    if "LOCAL_WORLD_SIZE" in os.environ and "RANK" in os.environ:
        ranks = Ranks(
            rank=int(os.environ["RANK"]),
            devices=int(os.environ["LOCAL_WORLD_SIZE"]),
            nodes=int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"]),
        )
        if devices not in (1, ranks.devices):
            raise ConfigError(
                f"trainer.devices: {devices}, but torchrun started {ranks.devices} processes on this machine; "
                f"set trainer.devices: {ranks.devices}, or start torchrun with --nproc-per-node={devices}"
            )
    else:
        ranks = Ranks(rank=int(os.environ.get("LOCAL_RANK", 0)), devices=devices, nodes=1)
    if device == "cuda":
        import torch

        if ranks.devices > torch.cuda.device_count():
            raise ConfigError(
                f"trainer.devices: {ranks.devices}, but PyTorch sees {torch.cuda.device_count()} GPUs on this machine; reduce it"
            )
    return ranks
