"""Datasets and collation of the loader's worker processes.

Does not import Lightning, whose import takes three times as long as all other imports of a worker.
"""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing import parent_process
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from refract.augment import Augmenter, ImageError, Preprocess
from refract.augment.executors.jpeg_batch import header_of
from refract.models.allocator import keep_freed_memory
from refract.models.multimodal.tokens import Tokens, pad_rows
from refract.pipeline.data.manifest import DataError, Manifest, Sample
from refract.pipeline.data.packed_samples import PackedSamples
from refract.plugins import LoadedPlugins

Item = dict[str, Any]
T = TypeVar("T")


class TrainDataset(Dataset[Item]):
    """Augmented training samples, indexed by (epoch, index, repeat).

    views: return three views of each image, 3×3×H×W, by `Augmenter.views`. decoded: the decoded images, uint8 H×W×3; None reads the files
    for each access. raw: return `keys` for the batch executor instead of images. encoded: return `keys`, and for files that a device
    decodes `jpeg` (bytes) and `header` (its size, height, width, orientation) instead of images; `collate_encoded` stacks them.
    """

    def __init__(
        self,
        samples: Sequence[Sample] | PackedSamples,
        augmenter: Augmenter,
        targets: np.ndarray,
        *,
        views: bool = False,
        decoded: Sequence[np.ndarray] | None = None,
        raw: bool = False,
        encoded: bool = False,
        tokens: Tokens | None = None,
        reads_images: bool = True,
    ) -> None:
        # The first attribute, as a worker process needs it to unpickle the augmenter's ops.
        self.plugins = LoadedPlugins()
        self.tokens, self.reads_images = tokens, reads_images
        self.samples, self.augmenter, self.targets, self.views = samples, augmenter, targets, views
        self.decoded, self.raw, self.encoded = decoded, raw, encoded

    def __getstate__(self) -> dict[str, Any]:
        return _packed(self.__dict__)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int, int]) -> Item:
        _, index, repeat = key
        item = {"targets": self.targets[index], "indices": index, "repeats": repeat}
        if self.tokens is not None:
            item |= _read(self.samples[index], self.tokens, self.augmented(key))
        if self.raw:
            return {**item, "keys": key}
        if not self.reads_images:
            return item
        if self.encoded:
            return {**item, "keys": key, **named(self.samples[index], lambda data: self._stored(data, key))}
        return {"images": self.image(key), **item}

    def image(self, key: tuple[int, int, int]) -> np.ndarray:
        """Return the augmented image, or its views."""
        epoch, index, repeat = key
        augment = self.augmenter.views if self.views else self.augmenter
        return named(
            self.samples[index],
            lambda data: augment(data, epoch=epoch, index=index, repeat=repeat),
            None if self.decoded is None else self.decoded[index],
        )

    def _stored(self, data: bytes, key: tuple[int, int, int]) -> Item:
        """Return `jpeg` and `header` of a file that a device decodes, `images` of another one."""
        header = header_of(data, color_profile=self.augmenter.color_profile)
        if header is not None:
            return {"jpeg": data, "header": (len(data), *header)}
        epoch, index, repeat = key
        return {"images": self.augmenter(data, epoch=epoch, index=index, repeat=repeat)}

    def augmented(self, key: tuple[int, int, int]) -> str:
        """Return the sample's text, augmented by the policy."""
        epoch, index, repeat = key
        text = self.samples[index].text
        return self.augmenter.text(text, epoch=epoch, index=index, repeat=repeat) if self.augmenter.texts else text


class ImageDataset(Dataset[Item]):
    """Preprocessed samples, by index. decoded: the preprocessed images, uint8 H×W×3, or None to read the files for each access."""

    def __init__(
        self,
        samples: Sequence[Sample] | PackedSamples,
        preprocess: Preprocess,
        targets: np.ndarray,
        decoded: Sequence[np.ndarray] | None = None,
        tokens: Tokens | None = None,
        reads_images: bool = True,
    ) -> None:
        self.samples, self.preprocess, self.targets, self.decoded = samples, preprocess, targets, decoded
        self.tokens, self.reads_images = tokens, reads_images

    def __getstate__(self) -> dict[str, Any]:
        return _packed(self.__dict__)

    def __len__(self) -> int:
        return len(self.samples)

    def pixels(self, index: int) -> np.ndarray:
        """Return the preprocessed image, uint8 H×W×3."""
        return named(self.samples[index], self.preprocess) if self.decoded is None else self.decoded[index]

    def __getitem__(self, index: int) -> Item:
        item = {"targets": self.targets[index], "indices": index}
        if self.tokens is not None:
            item |= _read(self.samples[index], self.tokens, self.samples[index].text)
        return {"images": self.pixels(index), **item} if self.reads_images else item


def _packed(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a dataset for a worker process."""
    return {**state, "samples": PackedSamples(state["samples"])}


def collate(items: Sequence[Item]) -> Item:
    """Stack items to a batch.

    `images` uint8 H×W×3 become B×3×H×W, and V×H×W×3 views B×V×3×H×W; `texts` are zero-padded to the longest. ValueError for images of
    different sizes.
    """
    batch = {
        name: torch.from_numpy(np.stack([np.asarray(item[name]) for item in items]))
        for name in items[0]
        if name not in ("images", "texts")
    }
    if "texts" in items[0]:
        batch["texts"] = torch.from_numpy(pad_rows([item["texts"] for item in items]))
    if "images" not in items[0]:
        return batch
    first = items[0]["images"]
    odd = next((item for item in items if item["images"].shape != first.shape), None)
    if odd is not None:
        raise ValueError(f"images of {first.shape} and {odd['images'].shape} in one batch; give Augmenter a size")
    views = first.shape[:-3]
    images = np.empty((len(items), *views, 3, *first.shape[-3:-1]), np.uint8)
    for row, item in zip(images, items, strict=True):
        for target, view in zip(row, item["images"], strict=True) if views else ((row, item["images"]),):
            cv2.split(view, list(target))
    return {**batch, "images": torch.from_numpy(images)}


def targets_of(samples: Sequence[Sample], manifest: Manifest) -> np.ndarray:
    """Return int64 (N,) class indices, or for multilabel float32 N×C zeros and ones."""
    if manifest.task != "multilabel":
        return np.array([sample.labels[0] for sample in samples], dtype=np.int64)
    targets = np.zeros((len(samples), len(manifest.labels)), dtype=np.float32)
    for row, sample in zip(targets, samples, strict=True):
        row[list(sample.labels)] = 1
    return targets


def _read(sample: Sample, tokens: Tokens, text: str) -> Item:
    """Return the inputs of a text network: `texts` and `has_image`."""
    return {"texts": tokens(text)[0], "has_image": sample.has_image}


def named(sample: Sample, use: Callable[[Any], T], pixels: np.ndarray | None = None) -> T:
    """Apply `use` to the sample's bytes, or to `pixels` if given. DataError names the file of a failure."""
    try:
        return use(sample.read() if pixels is None else pixels)
    except (ImageError, OSError) as error:
        raise DataError(f"{sample.path}: was readable during the data check, but is not now: {error}") from error
    except ValueError as error:  # raised by a third-party transform
        raise DataError(f"{sample.path}: the augmentation failed: {error}") from error


KEPT = 128 << 20
"""Bytes of freed memory that a worker keeps for the next image."""


NOT_SENT = 74
"""The exit code of a worker that cannot send a batch (sysexits.h: input or output failed)."""


def init_worker(_: int) -> None:
    """Initialise a worker process.

    OpenCV uses one thread, as the workers already use all cores. The worker exits with the training process: PyTorch only watches the fork
    server, which lives as long as any worker. The worker ignores SIGINT and SIGTERM, as the training process needs batches to finish its
    step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # By default the queue prints a traceback, loses the batch, and training waits for it forever.
    Queue._on_queue_feeder_error = staticmethod(_exit_unsent)  # type: ignore[attr-defined]
    cv2.setNumThreads(1)
    keep_freed_memory(at_most=KEPT)
    threading.Thread(target=_exit_with, args=[parent_process()], daemon=True).start()


def _exit_unsent(*_: Any) -> None:
    os._exit(NOT_SENT)


def _exit_with(parent: Any) -> None:
    wait([parent.sentinel])
    os._exit(1)
