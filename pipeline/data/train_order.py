"""In which order samples are seen, and by which process."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from refract.augment import SampleKey
from refract.augment.random import generator
from refract.augment.samplers import epoch_order


class TrainOrder(Sampler[SampleKey]):
    """(epoch, index, repeat) in the epoch's own order.

    repeats: draws of each sample beside each other; an epoch keeps its length and so takes 1/repeats of the samples (repeated
    augmentation: Hoffer et al. 2020, arXiv:1901.09335). classes: of each sample, to draw all classes equally often, samples of small ones
    repeatedly; None takes each sample once. repeat counts the draws of a sample in the epoch, so that each is augmented in its own way.

    The epoch travels with the index, so that a worker process needs no state: it augments what it is asked for. Lightning calls
    `set_epoch`; `resume` skips what was seen of an epoch before an interruption.

    rank, processes: of this process among those that train together: each takes every processes-th sample of the one order, and all equally
    many, for which the order begins again at its end.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int,
        repeats: int = 1,
        classes: Sequence[int] | None = None,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.count, self.seed, self.repeats, self.epoch = count, seed, repeats, 0
        self._resumed = (-1, 0)  # in which epoch how many samples of this process are skipped
        self.rank, self.processes = rank, processes
        self.classes = None if classes is None else np.asarray(classes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def resume(self, epoch: int, seen: int) -> None:
        """Begin with `epoch`, without the first `seen` samples of this process."""
        self.epoch, self._resumed = epoch, (epoch, seen)

    def __len__(self) -> int:
        return -(-self.count // self.processes)

    def __iter__(self) -> Iterator[SampleKey]:
        if self.classes is None:
            order = epoch_order(self.count, seed=self.seed, epoch=self.epoch)
        else:
            order = self._balanced(generator(self.seed, self.epoch, 0, "order"))
        places = order.tolist()
        draws = (self.repeats * _earlier(order)).tolist()
        start = self._resumed[1] if self.epoch == self._resumed[0] else 0
        own = (k * self.processes + self.rank for k in range(start, len(self)))
        return (
            SampleKey(self.epoch, places[k // self.repeats], draws[k // self.repeats] + k % self.repeats)
            for k in (k % self.count for k in own)
        )

    def _balanced(self, rng: np.random.Generator) -> np.ndarray:
        """`count` samples, the classes in turn, each class going through its own in a drawn order again and again; shuffled."""
        assert self.classes is not None
        present = rng.permutation(np.unique(self.classes))
        share = -(-self.count // len(present))
        drawn = []
        for label in present:
            own = np.flatnonzero(self.classes == label)
            rounds = [rng.permutation(own) for _ in range(-(-share // len(own)))]
            drawn.append(np.concatenate(rounds)[:share])
        return rng.permutation(np.stack(drawn, axis=1).ravel()[: self.count])


def _earlier(order: np.ndarray) -> np.ndarray:
    """How often each entry stood in the order before."""
    by_value = np.argsort(order, kind="stable")
    begins = np.r_[True, np.diff(order[by_value]) > 0]
    runs = np.flatnonzero(begins)[np.cumsum(begins) - 1]
    counts = np.empty_like(by_value)
    counts[by_value] = np.arange(len(order)) - runs
    return counts


class Share(Sampler[int]):
    """Every processes-th of `count` places from `rank` on: each place once, for measuring."""

    def __init__(self, count: int, rank: int = 0, processes: int = 1) -> None:
        self.places = range(rank, count, processes)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)
