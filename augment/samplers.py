"""Samplers that pass (epoch, index, repeat) to a loader's workers, so that the epoch travels with the index.

If each worker counts epochs itself, `persistent_workers=True` hides the next epoch from it, and every epoch augments alike: the oldest
augmentation bug of training loops. Here a worker keeps no state: its draws are a function of the key that it receives.
This module does not import PyTorch; any iterable of indices with a length is a sampler.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from operator import index as index_of
from typing import NamedTuple

import numpy as np

from refract.augment.random import generator


class SampleKey(NamedTuple):
    """The key of a draw. epoch: from 0. index: the index of the sample. repeat: number of the sample's draw in this epoch, from 0."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    repeat: int = 0


class EpochSampler:
    """Wrap a sampler of indices and yield `SampleKey`s, for `DataLoader(AugmentedDataset(…), sampler=EpochSampler(…))`.

    The first iteration is epoch 0; each further iteration adds 1. Lightning and accelerate set the epoch by `set_epoch`. The epoch is
    passed to the wrapped sampler's `set_epoch`, if any; without it the order of a `DistributedSampler` would never change.
    An index that occurs repeatedly in one epoch (weighted sampling with replacement) counts `repeat` up, so that each occurrence is
    augmented differently.
    """

    def __init__(self, sampler: Iterable[int], *, epoch: int = 0) -> None:
        """Wrap `sampler`, an iterable of indices with a length, such as one of `torch.utils.data` or `range(n)`; else TypeError."""
        if not hasattr(sampler, "__iter__") or not hasattr(sampler, "__len__"):
            raise TypeError(
                f"EpochSampler: {type(sampler).__name__} is not an iterable of indices with a length; "
                "pass a sampler such as ShuffleSampler(len(dataset))"
            )
        self.sampler = sampler
        self._resumed = (-1, 0)  # (epoch, samples to skip)
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, counted from 0."""
        self._next = _non_negative("epoch", epoch)

    def resume(self, epoch: int, seen: int = 0) -> None:
        """Start the next iteration in `epoch` after the first `seen` samples, which this process has trained on.

        A loader prefetches batches, so count the batches that the loop finished: seen = batches × batch size.
        The draws equal those of an uninterrupted run. So does the order if the sampler derives it from the epoch, as `ShuffleSampler` and
        `DistributedSampler` do.
        """
        self.set_epoch(epoch)
        self._resumed = (self._next, _non_negative("seen", seen))

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[SampleKey]:
        # A generator reads the epoch with the first key: DataLoader creates iterators that it never uses.
        epoch = self._next
        self._next = epoch + 1
        skipped = self._resumed[1] if epoch == self._resumed[0] else 0
        if callable(set_epoch := getattr(self.sampler, "set_epoch", None)):
            set_epoch(epoch)
        draws: Counter[int] = Counter()
        for position, item in enumerate(self.sampler):
            try:
                index = index_of(item)
            except TypeError as error:
                raise TypeError(
                    f"EpochSampler: the sampler yielded {str(item)[:80]} ({type(item).__name__}) instead of an index; "
                    "wrap the sampler of single indices, and put a batch sampler around the EpochSampler"
                ) from error
            if position >= skipped:
                yield SampleKey(epoch, index, draws[index])
            draws[index] += 1


class ShuffleSampler:
    """Yield each of `count` indices once, in an order that depends on (seed, epoch) only, split between the ranks of a distributed run.

    rank, world_size: of this process. Rank r takes the positions r, r + world_size, … of the order. All ranks take the same number, so
    up to world_size − 1 indices occur twice. The order is that of epoch 0 until `set_epoch` is called; an `EpochSampler` calls it.
    """

    def __init__(self, count: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        """Check the numbers. ValueError for a negative count or a rank outside 0 … world_size − 1."""
        self.count, self.seed, self.epoch = _non_negative("count", count), seed, 0
        self.rank, self.world_size = _non_negative("rank", rank), _non_negative("world_size", world_size)
        if self.rank >= self.world_size:
            raise ValueError(f"rank: {rank} is not below world_size {world_size}")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = _non_negative("epoch", epoch)

    def __len__(self) -> int:
        return -(-self.count // self.world_size)

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.count, seed=self.seed, epoch=self.epoch).tolist()
        return (order[i % self.count] for i in range(self.rank, len(self) * self.world_size, self.world_size))


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of 0 … count − 1, int64, for (seed, epoch)."""
    return generator(seed, epoch, 0, "order").permutation(count)


def _non_negative(name: str, value: int) -> int:
    try:
        number = index_of(value)
    except TypeError as error:
        raise ValueError(f"{name}: {value!r} is not a whole number") from error
    if number < 0:
        raise ValueError(f"{name}: {value!r} is negative")
    return number
