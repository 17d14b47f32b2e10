"""One training in several processes, each with a device of its own: on one machine by trainer.devices, on several by torchrun."""

import os
from dataclasses import dataclass

from refract.pipeline.config.config import ConfigError


@dataclass(frozen=True)
class Ranks:
    """rank: of this process among all; devices: processes a machine; nodes: machines."""

    rank: int
    devices: int
    nodes: int

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, tracks and reports."""
        return self.rank == 0

    @property
    def count(self) -> int:
        return self.devices * self.nodes


def processes(devices: int, device: str) -> Ranks:
    """What torchrun's environment says, or Lightning's for a process that the first one started, else this one as the first of `devices`.

    device: `cpu` or `cuda`. ConfigError for more than there are GPUs, or where torchrun started another number than asked for.
    """
    if "LOCAL_WORLD_SIZE" in os.environ and "RANK" in os.environ:
        found = Ranks(
            rank=int(os.environ["RANK"]),
            devices=int(os.environ["LOCAL_WORLD_SIZE"]),
            nodes=int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"]),
        )
        if devices not in (1, found.devices):
            raise ConfigError(
                f"trainer.devices: {devices}, but torchrun started {found.devices} processes on this machine"
            )
    else:
        found = Ranks(rank=int(os.environ.get("LOCAL_RANK", 0)), devices=devices, nodes=1)
    if device == "cuda":
        import torch

        if found.devices > torch.cuda.device_count():
            raise ConfigError(
                f"trainer.devices: {found.devices}, but PyTorch sees {torch.cuda.device_count()} GPUs here"
            )
    return found
