"""The epoch travels with the index: samplers that give (epoch, index, repeat) to a loader's workers.

A worker that keeps its own epoch is the oldest bug of augmentation in training loops: with `persistent_workers=True` it never hears of the
next one, and every epoch sees the same images. Here a worker keeps no state: what it draws is a function of the key that it is asked for.
Nothing here imports PyTorch; every iterable of indices with a length is a sampler.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from operator import index as index_of
from typing import NamedTuple

import numpy as np

from refract.augment.random import generator


class SampleKey(NamedTuple):
    """What names a draw: the epoch, the sample's index, and which of the sample's draws in that epoch it is."""

    epoch: int
    index: int  # type: ignore[assignment]  # it hides the method that every tuple has
    repeat: int = 0


class EpochSampler:
    """Wrap any sampler of indices and give `SampleKey`s, for `DataLoader(AugmentedDataset(…), sampler=EpochSampler(…))`.

    The epoch is 0 in the first iteration and one more in each further one; `set_epoch`, which Lightning and accelerate call, sets it. It is
    passed on to a wrapped sampler that has `set_epoch`, such as `DistributedSampler`, whose order would otherwise never change.
    An index that comes repeatedly in one epoch, as weighted sampling with replacement gives it, counts its `repeat`, so
    that each occurrence is augmented in its own way.
    """

    def __init__(self, sampler: Iterable[int], *, epoch: int = 0) -> None:
        """sampler: an iterable of indices with a length, such as any of `torch.utils.data` or `range(n)`. TypeError for another."""
        if not hasattr(sampler, "__iter__") or not hasattr(sampler, "__len__"):
            raise TypeError(
                f"EpochSampler: {type(sampler).__name__} is not an iterable of indices with a length; "
                "pass a sampler such as ShuffleSampler(len(dataset))"
            )
        self.sampler = sampler
        self._skipped = (-1, 0)
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, counted from 0."""
        self._next = _whole("epoch", epoch)

    def resume(self, epoch: int, seen: int = 0) -> None:
        """Start the next iteration in `epoch`, without the first `seen` samples that this process has trained on.

        A loader fetches batches ahead, so count the batches that the loop finished: seen = batches × batch size. The draws are those
        of an uninterrupted run; so is the order where it is a function of the epoch, as of `ShuffleSampler` and `DistributedSampler`.
        """
        self.set_epoch(epoch)
        self._skipped = (self._next, _whole("seen", seen))

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[SampleKey]:
        # A generator: the epoch is taken when the first key is, as DataLoader makes iterators that it never uses.
        epoch = self._next
        self._next = epoch + 1
        skipped = self._skipped[1] if epoch == self._skipped[0] else 0
        if callable(set_epoch := getattr(self.sampler, "set_epoch", None)):
            set_epoch(epoch)
        draws: Counter[int] = Counter()
        for place, item in enumerate(self.sampler):
            try:
                index = index_of(item)
            except TypeError as error:
                raise TypeError(
                    f"EpochSampler: the sampler gave {str(item)[:80]} ({type(item).__name__}) in place of an index; "
                    "wrap the sampler of single indices, and put a batch sampler around the EpochSampler"
                ) from error
            if place >= skipped:
                yield SampleKey(epoch, index, draws[index])
            draws[index] += 1


class ShuffleSampler:
    """Give each of `count` indices once, in an order that is a function of (seed, epoch), split between the ranks of a distributed run.

    rank, world_size: of this process; rank r takes the places r, r + world_size, … All ranks take equally many, so up to
    world_size − 1 indices come twice. Without `set_epoch`, which an `EpochSampler` around it calls, the order is that of epoch 0.
    """

    def __init__(self, count: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        """ValueError for a negative count or a rank that is not in 0 … world_size − 1."""
        self.count, self.seed, self.epoch = _whole("count", count), seed, 0
        self.rank, self.world_size = _whole("rank", rank), _whole("world_size", world_size)
        if self.rank >= self.world_size:
            raise ValueError(f"rank: {rank} is not below world_size {world_size}")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = _whole("epoch", epoch)

    def __len__(self) -> int:
        return -(-self.count // self.world_size)

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.count, seed=self.seed, epoch=self.epoch).tolist()
        return (order[place % self.count] for place in range(self.rank, len(self) * self.world_size, self.world_size))


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 … count − 1, int64, as a function of (seed, epoch)."""
    return generator(seed, epoch, 0, "order").permutation(count)


def _whole(name: str, value: int) -> int:
    try:
        number = index_of(value)
    except TypeError as error:
        raise ValueError(f"{name}: {value!r} is not a whole number") from error
    if number < 0:
        raise ValueError(f"{name}: {value!r} is negative")
    return number
