"""The Lightning DataModule: augmented pictures to train on, preprocessed ones to measure on, uint8 until the device."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from augment import Augmenter, ImageError, Preprocess, planes
from augment.random import generator
from pipeline.data.manifest import DataError, Manifest, Sample

Item = dict[str, Any]


class TrainOrder(Sampler[tuple[int, int, int]]):
    """(epoch, index, repeat) in the epoch's own order.

    repeats: draws of each sample beside each other; an epoch keeps its length and so takes 1/repeats of the samples (repeated
    augmentation: Hoffer et al. 2020, arXiv:1901.09335).

    The epoch travels with the index, so that a worker process needs no state: it augments what it is asked for. Lightning calls
    `set_epoch`; `start` skips that many samples of the next pass, to go on in the middle of an epoch.
    """

    def __init__(self, count: int, *, seed: int, start: int = 0, repeats: int = 1) -> None:
        self.count, self.seed, self.start, self.repeats, self.epoch = count, seed, start, repeats, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        order = generator(self.seed, self.epoch, 0, "order").permutation(self.count).tolist()
        return ((self.epoch, order[k // self.repeats], k % self.repeats) for k in range(self.start, self.count))


class TrainPictures(Dataset[Item]):
    """Augmented training pictures, by (epoch, index, repeat). views: three of each, 3×3×H×W, as `Augmenter.views`."""

    def __init__(
        self, samples: Sequence[Sample], augmenter: Augmenter, targets: np.ndarray, *, views: bool = False
    ) -> None:
        self.samples, self.augmenter, self.targets, self.views = samples, augmenter, targets, views

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int, int]) -> Item:
        epoch, index, repeat = key
        augment = self.augmenter.views if self.views else self.augmenter
        image = _named(self.samples[index], lambda data: augment(data, epoch=epoch, index=index, repeat=repeat))
        images = torch.stack([_to_tensor(view) for view in image]) if self.views else _to_tensor(image)
        return {"images": images, "targets": self.targets[index], "indices": index}


class Pictures(Dataset[Item]):
    """Preprocessed pictures, by index."""

    def __init__(self, samples: Sequence[Sample], preprocess: Preprocess, targets: np.ndarray) -> None:
        self.samples, self.preprocess, self.targets = samples, preprocess, targets

    def __len__(self) -> int:
        return len(self.samples)

    def pixels(self, index: int) -> np.ndarray:
        """uint8 H×W×3."""
        return _named(self.samples[index], self.preprocess)

    def __getitem__(self, index: int) -> Item:
        return {"images": _to_tensor(self.pixels(index)), "targets": self.targets[index], "indices": index}


class PictureData(lightning.LightningDataModule):
    """Batches: `images` uint8 B×3×H×W, `targets` int64 (B,) or float32 B×C (multilabel), `indices` int64 (B,)."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        augmenter: Augmenter,
        preprocess: Preprocess,
        batch_size: int,
        workers: int | None = None,
        repeats: int = 1,
        views: bool = False,
    ) -> None:
        """repeats, views: of the training pictures, see `TrainOrder` and `TrainPictures`. workers: None takes none for a small data set
        in memory, else one for each core, at most 8."""
        super().__init__()
        if workers is None:
            workers = 0 if manifest.samples[0].data is not None else min(8, os.cpu_count() or 1)
        self.manifest, self.preprocess, self.batch_size, self.workers = manifest, preprocess, batch_size, workers
        train = manifest.of("train")
        self.train_set = TrainPictures(train, augmenter, targets_of(train, manifest), views=views)
        self.order = TrainOrder(len(train), seed=augmenter.seed, repeats=repeats)
        self.pin = torch.cuda.is_available()

    def train_dataloader(self) -> DataLoader[Item]:
        count = len(self.train_set)
        # Batch normalisation cannot learn from a last batch of one.
        drop_last = count > self.batch_size and count % self.batch_size == 1
        return self._loader(self.train_set, sampler=self.order, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader[Item]:
        return self.loader_of("val")

    def loader_of(self, split: str) -> DataLoader[Item]:
        samples = self.manifest.of(split)
        return self._loader(Pictures(samples, self.preprocess, targets_of(samples, self.manifest)))

    def _loader(self, dataset: Dataset[Item], **options: Any) -> DataLoader[Item]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.pin,
            worker_init_fn=_one_thread,
            multiprocessing_context=_workers_context() if self.workers else None,
            **options,
        )


def targets_of(samples: Sequence[Sample], manifest: Manifest) -> np.ndarray:
    """int64 (N,) class indices, or float32 N×C zeros and ones for multilabel."""
    if manifest.task != "multilabel":
        return np.array([sample.labels[0] for sample in samples], dtype=np.int64)
    targets = np.zeros((len(samples), len(manifest.labels)), dtype=np.float32)
    for row, sample in zip(targets, samples, strict=True):
        row[list(sample.labels)] = 1
    return targets


def _named(sample: Sample, use: Any) -> np.ndarray:
    """`use` on the sample's bytes; what goes wrong names the file."""
    try:
        return use(sample.read())
    except (ImageError, OSError) as error:
        raise DataError(f"{sample.path}: was readable when the data was checked, but not now: {error}") from error
    except ValueError as error:  # a guest of the policy that cannot work with this picture
        raise DataError(f"{sample.path}: the augmentation failed on it: {error}") from error


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(planes(image))


def _workers_context() -> Any:
    """Workers start from a clean server process, not as forks of this one.

    A fork takes along the locks of the threads that OpenCV and OpenMP run here, but not the threads, and then waits for ever.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # PyTorch is imported once, there, not once a worker
    return context


def _one_thread(_: int) -> None:
    """Each worker is one process of many: OpenCV's own threads would only fight over the cores."""
    import cv2

    cv2.setNumThreads(1)
