"""The ranks of a training, one per device: on one machine by trainer.devices, on several machines by torchrun."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from refract.pipeline.config.config import ConfigError
from refract.pipeline.training.attempt import current_attempt

PUBLISHED = "REFRACT_RANK_0"
"""Environment variable with what rank 0 published, for the ranks that Lightning's rank 0 starts."""

_calls: Counter[str] = Counter()  # of `from_rank_0`, by key, for torchrun's store, where a value never changes


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


def by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_WORLD_SIZE" in os.environ and "RANK" in os.environ


def is_further_rank() -> bool:
    """Whether Lightning's rank 0 started this process, by its own command line, as a further rank of its training."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "LOCAL_WORLD_SIZE" not in os.environ


def current_ranks(devices: int, device: str) -> Ranks:
    """Read the ranks from torchrun's environment or from Lightning's, else return rank 0 of `devices`.

    device: `cpu` or `cuda`. Raises ConfigError for more ranks than GPUs, or if torchrun started another number of ranks than `devices`.
    """
    if by_torchrun():
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


def batches_of_step(batch_size: int, accumulate: int, *, before: int, count: int) -> tuple[int, int]:
    """Return (batch size, accumulated batches) with which `count` ranks take steps as large as `before` ranks did.

    batch_size, accumulate: those of each of the `before` ranks. No batch is larger than before, so that it fits the memory.
    Raises ConfigError if the step's samples cannot be divided equally.
    """
    step = batch_size * accumulate * before
    if step % count:
        fits = [ranks for ranks in range(1, 4 * before + 1) if step % ranks == 0]
        raise ConfigError(
            f"--resume: the run started on {before} ranks with {step} samples per step, which {count} ranks cannot divide equally; "
            f"resume on one of these numbers of ranks: {', '.join(map(str, fits))}"
        )
    per_rank = step // count
    size = max(size for size in range(1, min(batch_size, per_rank) + 1) if per_rank % size == 0)
    return size, per_rank // size


def from_rank_0(key: str, decide: Callable[[], Any]) -> Any:
    """Return what rank 0 decides, on every rank. The value is stored as JSON.

    Every rank must call it in the same order for a key. Ranks that torchrun started share it through torchrun's store. Ranks that Lightning
    starts read what rank 0 decided before it started them. A rank that finds neither decides for itself.
    """
    if by_torchrun() and (attempt := current_attempt()) is not None:
        _calls[key] += 1
        name = f"{key}/{_calls[key]}"
        if int(os.environ["RANK"]):
            return json.loads(attempt.store.get(name))
        value = decide()
        attempt.store.set(name, json.dumps(value))
        return value
    published = json.loads(os.environ.get(PUBLISHED, "{}"))
    if is_further_rank() and key in published:
        return published[key]
    value = decide()
    if not by_torchrun():
        os.environ[PUBLISHED] = json.dumps({**published, key: value})
    return value
