"""What a process that loads images does: samples by their number, augmented or preprocessed, and batches of them. Knows nothing of
Lightning, whose import takes three times as long as that of all that is needed here."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing import parent_process
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from refract.augment import Augmenter, ImageError, Preprocess
from refract.models.allocator import keep_freed_memory
from refract.models.multimodal.tokens import Tokens, rows
from refract.pipeline.data.manifest import DataError, Manifest, Sample

Item = dict[str, Any]


class TrainDataset(Dataset[Item]):
    """Augmented training images, by (epoch, index, repeat). views: three of each, 3×3×H×W, as `Augmenter.views`. decoded: the images
    as `decoded` gives them, None to read them anew each time; raw: without the images, but with what the batch executor draws by."""

    def __init__(
        self,
        samples: Sequence[Sample],
        augmenter: Augmenter,
        targets: np.ndarray,
        *,
        views: bool = False,
        decoded: Sequence[np.ndarray] | None = None,
        raw: bool = False,
        tokens: Tokens | None = None,
        reads_images: bool = True,
    ) -> None:
        self.tokens, self.reads_images = tokens, reads_images
        self.samples, self.augmenter, self.targets, self.views = samples, augmenter, targets, views
        self.decoded, self.raw = decoded, raw

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int, int]) -> Item:
        epoch, index, repeat = key
        item = {"targets": self.targets[index], "indices": index, "repeats": repeat}
        if self.tokens is not None:
            item |= _read(self.samples[index], self.tokens, self.augmented(key))
        if self.raw:
            return {**item, "keys": key}
        if not self.reads_images:
            return item
        augment = self.augmenter.views if self.views else self.augmenter
        image = named(
            self.samples[index],
            lambda data: augment(data, epoch=epoch, index=index, repeat=repeat),
            None if self.decoded is None else self.decoded[index],
        )
        return {"images": image, **item}

    def augmented(self, key: tuple[int, int, int]) -> str:
        """The sample's text as the policy draws it."""
        epoch, index, repeat = key
        text = self.samples[index].text
        return self.augmenter.text(text, epoch=epoch, index=index, repeat=repeat) if self.augmenter.texts else text


class ImageDataset(Dataset[Item]):
    """Preprocessed images, by index. decoded: as they are after preprocessing, or None."""

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Preprocess,
        targets: np.ndarray,
        decoded: Sequence[np.ndarray] | None = None,
        tokens: Tokens | None = None,
        reads_images: bool = True,
    ) -> None:
        self.samples, self.preprocess, self.targets, self.decoded = samples, preprocess, targets, decoded
        self.tokens, self.reads_images = tokens, reads_images

    def __len__(self) -> int:
        return len(self.samples)

    def pixels(self, index: int) -> np.ndarray:
        """uint8 H×W×3."""
        return named(self.samples[index], self.preprocess) if self.decoded is None else self.decoded[index]

    def __getitem__(self, index: int) -> Item:
        item = {"targets": self.targets[index], "indices": index}
        if self.tokens is not None:
            item |= _read(self.samples[index], self.tokens, self.samples[index].text)
        return {"images": self.pixels(index), **item} if self.reads_images else item


def collate(items: Sequence[Item]) -> Item:
    """One batch of items: uint8 H×W×3 `images` or views of that become B×3×H×W, B×V×3×H×W; `texts` are filled up to the longest; the others
    are stacked."""
    batch = {
        name: torch.from_numpy(np.stack([np.asarray(item[name]) for item in items]))
        for name in items[0]
        if name not in ("images", "texts")
    }
    if "texts" in items[0]:
        batch["texts"] = torch.from_numpy(rows([item["texts"] for item in items]))
    if "images" not in items[0]:
        return batch
    first = items[0]["images"]
    odd = next((item for item in items if item["images"].shape != first.shape), None)
    if odd is not None:
        raise ValueError(f"images of {first.shape} and {odd['images'].shape} in one batch: give Augmenter a size")
    views = first.shape[:-3]
    images = np.empty((len(items), *views, 3, *first.shape[-3:-1]), np.uint8)
    for place, item in zip(images, items, strict=True):
        for target, view in zip(place, item["images"], strict=True) if views else ((place, item["images"]),):
            cv2.split(view, list(target))
    return {**batch, "images": torch.from_numpy(images)}


def targets_of(samples: Sequence[Sample], manifest: Manifest) -> np.ndarray:
    """int64 (N,) class indices, or float32 N×C zeros and ones for multilabel."""
    if manifest.task != "multilabel":
        return np.array([sample.labels[0] for sample in samples], dtype=np.int64)
    targets = np.zeros((len(samples), len(manifest.labels)), dtype=np.float32)
    for row, sample in zip(targets, samples, strict=True):
        row[list(sample.labels)] = 1
    return targets


def _read(sample: Sample, tokens: Tokens, text: str) -> Item:
    """What a network that reads texts gets beside the image."""
    return {"texts": tokens(text)[0], "has_image": sample.has_image}


def named(sample: Sample, use: Callable[[Any], np.ndarray], pixels: np.ndarray | None = None) -> np.ndarray:
    """`use` on the sample's bytes, or on its pixels where they are at hand; what goes wrong names the file."""
    try:
        return use(sample.read() if pixels is None else pixels)
    except (ImageError, OSError) as error:
        raise DataError(f"{sample.path}: was readable when the data was checked, but not now: {error}") from error
    except ValueError as error:  # a guest of the policy that cannot work with this image
        raise DataError(f"{sample.path}: the augmentation failed on it: {error}") from error


KEPT = 128 << 20
"""Bytes of freed memory that a worker keeps for the next image."""


NOT_SENT = 74
"""The exit code of a worker that cannot send a batch (sysexits.h: input or output failed)."""


def begin_worker(_: int) -> None:
    """A worker's first step. It is one process of many: OpenCV's own threads would only fight over the cores. And it ends with the process
    that trains: PyTorch looks after the server that workers are forked from, which lives as long as one of them does.

    Signals to the whole process group are for the process that trains: it still needs batches to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # By default the queue prints a traceback, loses the batch, and training waits for it forever.
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]
    cv2.setNumThreads(1)
    keep_freed_memory(at_most=KEPT)
    threading.Thread(target=_ends_with, args=[parent_process()], daemon=True).start()


def _end_unsent(*_: Any) -> None:
    os._exit(NOT_SENT)


def _ends_with(parent: Any) -> None:
    wait([parent.sentinel])
    os._exit(1)
