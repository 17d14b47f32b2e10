"""Samplers: the order of the training samples, and the samples of each rank."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from refract.augment import SampleKey
from refract.augment.random import generator
from refract.augment.samplers import epoch_order


class TrainOrder(Sampler[SampleKey]):
    """Yield (epoch, index, repeat) in an order that is shuffled for each epoch.

    repeats: consecutive draws of each sample; an epoch keeps its length and so visits 1/repeats of the samples (repeated augmentation:
    Hoffer et al. 2020, arXiv:1901.09335). classes: class of each sample, to draw all classes equally often and repeat samples of small
    classes; None visits each sample once. `repeat` counts the draws of a sample in the epoch, so that each draw is augmented differently.

    The key contains the epoch, so that a worker process needs no state. Lightning calls `set_epoch`; `resume` skips the samples of an epoch
    that were seen before an interruption.

    rank, world_size: this rank takes every world_size-th sample of the common order. All ranks take equally many: the order wraps around.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int,
        repeats: int = 1,
        classes: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.count, self.seed, self.repeats, self.epoch = count, seed, repeats, 0
        self._resumed = (-1, 0)  # (epoch, samples of all ranks to skip in it)
        self.rank, self.world_size = rank, world_size
        self.classes = None if classes is None else np.asarray(classes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def resume(self, epoch: int, seen: int) -> None:
        """Start at `epoch` without the first `seen` samples of the common order, which another number of ranks may have seen."""
        self.epoch, self._resumed = epoch, (epoch, seen)

    def __len__(self) -> int:
        return -(-self.count // self.world_size)

    def __iter__(self) -> Iterator[SampleKey]:
        if self.classes is None:
            order = epoch_order(self.count, seed=self.seed, epoch=self.epoch)
        else:
            order = self._balanced(generator(self.seed, self.epoch, 0, "order"))
        indices = order.tolist()
        draws = (self.repeats * _earlier(order)).tolist()
        start = self._resumed[1] if self.epoch == self._resumed[0] else 0
        left = -(-(self.count - start) // self.world_size)
        positions = (start + k * self.world_size + self.rank for k in range(left))
        return (
            SampleKey(self.epoch, indices[k // self.repeats], draws[k // self.repeats] + k % self.repeats)
            for k in (k % self.count for k in positions)
        )

    def _balanced(self, rng: np.random.Generator) -> np.ndarray:
        """Return `count` indices, shuffled: all classes equally often, each class cycling through its samples in random orders."""
        assert self.classes is not None
        present = rng.permutation(np.unique(self.classes))
        per_class = -(-self.count // len(present))
        drawn = []
        for label in present:
            members = np.flatnonzero(self.classes == label)
            rounds = [rng.permutation(members) for _ in range(-(-per_class // len(members)))]
            drawn.append(np.concatenate(rounds)[:per_class])
        return rng.permutation(np.stack(drawn, axis=1).ravel()[: self.count])


def _earlier(order: np.ndarray) -> np.ndarray:
    """Return for each entry how often its value occurs earlier in the order."""
    by_value = np.argsort(order, kind="stable")
    starts = np.r_[True, np.diff(order[by_value]) > 0]
    runs = np.flatnonzero(starts)[np.cumsum(starts) - 1]
    counts = np.empty_like(by_value)
    counts[by_value] = np.arange(len(order)) - runs
    return counts


class RankShard(Sampler[int]):
    """Every world_size-th of `count` indices, from `rank` on: each index once over all ranks, for evaluation."""

    def __init__(self, count: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, count, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
