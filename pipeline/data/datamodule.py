"""The Lightning DataModule: augmented images to train on, preprocessed ones to measure on, uint8 until the device."""

import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from refract.augment import Augmenter, Preprocess, decode, image_size
from refract.models.multimodal.tokens import Tokens
from refract.pipeline.data.datasets import ImageDataset, Item, TrainDataset, begin_worker, named, targets_of
from refract.pipeline.data.loader import Loader, hand_over, shared_memory_free
from refract.pipeline.data.manifest import DataError, Manifest, Sample
from refract.pipeline.data.train_order import Share, TrainOrder

HOST = ("keys", "indices", "repeats")
"""Parts of a batch that stay in the host's memory: which samples these are, and which of their draws."""


class ImageDataModule(lightning.LightningDataModule):
    """Batches: `images` uint8 B×3×H×W, `targets` int64 (B,) or float32 B×C (multilabel), `indices` int64 (B,); in training also
    `repeats` int64 (B,); for networks that read texts `texts` int32 B×L and `has_image` bool (B,), see
    `refract.models.multimodal.tokens`."""

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
        balanced: bool = False,
        memory: str = "never",
        on_device: bool = False,
        tokens: Tokens | None = None,
        reads_images: bool = True,
    ) -> None:
        """repeats, balanced, views: of the training images, see `TrainOrder` and `TrainDataset`. memory: see `fits_memory`; "always"
        keeps them decoded, "never" does not. on_device: augment batches of images in memory by the batch executor, on the device.
        workers: None takes none for images in memory, else one for each core, at most 8. tokens: of a network that reads texts;
        reads_images: whether it reads images. DataError for balanced multilabel data."""
        super().__init__()
        self.manifest, self.preprocess, self.batch_size = manifest, preprocess, batch_size
        train, targets = manifest.of("train"), targets_of(manifest.of("train"), manifest)
        if balanced and targets.ndim > 1:
            raise DataError(
                "data.sampler: balanced needs one label an image; for multilabel weigh the labels by loss.class_weights"
            )
        self.tokens, self.reads_images = tokens, reads_images
        self.in_memory = reads_images and (memory == "always" or (memory == "auto" and fits_memory(manifest.samples)))
        if workers is None:
            first = next((sample for sample in manifest.samples if sample.has_image), None)
            at_hand = not reads_images or first is None or first.data is not None
            workers = 0 if self.in_memory or at_hand else min(8, os.cpu_count() or 1)
        self.workers, self.shared = hand_over(workers, self._batch_bytes(augmenter, views), shared_memory_free())
        whole = partial(decode, color_profile=augmenter.color_profile)
        pixels = decoded(train, whole, "decoding") if self.in_memory else None
        alike = pixels is not None and len({image.shape for image in pixels}) == 1
        self.train_set = TrainDataset(
            train, augmenter, targets, views=views, decoded=pixels, raw=on_device and alike and not views,
            tokens=tokens, reads_images=reads_images,
        )  # fmt: skip
        self.order = TrainOrder(
            len(train), seed=augmenter.seed, repeats=repeats, classes=targets.tolist() if balanced else None
        )
        self.pin = torch.cuda.is_available()
        self._measured: dict[str, ImageDataset] = {}
        self._pixels: torch.Tensor | None = None  # N×3×H×W, where training's images are augmented

    def train_dataloader(self) -> DataLoader[Item]:
        self.order.rank, self.order.processes = self._place()
        count = len(self.order)
        # Batch normalisation cannot learn from a last batch of one.
        drop_last = count > self.batch_size and count % self.batch_size == 1
        return self._loader(self.train_set, sampler=self.order, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader[Item]:
        return self.loader_of("val")

    def images_of(self, split: str) -> ImageDataset:
        """Those of a split, preprocessed."""
        if split not in self._measured:
            samples = self.manifest.of(split)
            pixels = decoded(samples, self.preprocess, "preprocessing") if self.in_memory else None
            targets = targets_of(samples, self.manifest)
            self._measured[split] = ImageDataset(
                samples, self.preprocess, targets, pixels, tokens=self.tokens, reads_images=self.reads_images
            )
        return self._measured[split]

    def loader_of(self, split: str) -> DataLoader[Item]:
        dataset = self.images_of(split)
        return self._loader(dataset, sampler=Share(len(dataset), *self._place()))

    def state_dict(self) -> dict[str, int]:
        """Where the training is: the epoch, and the samples of it that each process has seen."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch:
            return {"epoch": self.trainer.current_epoch + 1, "seen": 0}
        return {"epoch": self.trainer.current_epoch, "seen": progress.current.ready * self.batch_size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self.order.resume(state_dict["epoch"], state_dict["seen"])

    def _batch_bytes(self, augmenter: Augmenter, views: bool) -> int:
        """Of the largest batch that workers hand over; texts and labels are a small part of it."""
        height, width = augmenter.size or (self.preprocess.height, self.preprocess.width)
        trained = height * width * (3 if views else 1)
        pixels = max(trained, self.preprocess.height * self.preprocess.width) if self.reads_images else 0
        return self.batch_size * (3 * pixels + 4096)

    def _place(self) -> tuple[int, int]:
        """Of this process: (rank, processes)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def transfer_batch_to_device(self, batch: Item, device: torch.device, dataloader_idx: int) -> Item:
        """Copy a batch to the device, but for what draws are made of: to read that back would make the processor wait for the device."""
        kept = {name: batch[name] for name in HOST if name in batch}
        moved = {name: value for name, value in batch.items() if name not in HOST}
        return {**super().transfer_batch_to_device(moved, device, dataloader_idx), **kept}

    def on_after_batch_transfer(self, batch: Item, dataloader_idx: int) -> Item:
        """Take the images that the batch names and augment them, on the device that it is on now."""
        keys = batch.pop("keys", None)
        if keys is None:
            return batch
        from refract.augment.executors import torch_batch as executor

        device = batch["targets"].device
        pixels = self._resident(device)
        indices = batch["indices"].to(pixels.device, non_blocking=True)
        images = pixels[indices].to(device, non_blocking=True)
        size = (images.shape[-2], images.shape[-1])
        plans = [
            self.train_set.augmenter.draw(size, epoch=epoch, index=index, repeat=repeat)
            for epoch, index, repeat in keys.tolist()
        ]
        return {**batch, "images": executor.run(plans, images)}

    def _resident(self, device: torch.device) -> torch.Tensor:
        """All training images, there where batches are indexed: on the device, where they fit half of its free memory."""
        if self._pixels is None:
            pixels = torch.from_numpy(np.stack(self.train_set.decoded or [])).permute(0, 3, 1, 2).contiguous()
            fits = device.type != "cuda" or pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2
            self._pixels = pixels.to(device) if fits else pixels
        return self._pixels

    def _loader(self, dataset: Dataset[Item], **options: Any) -> DataLoader[Item]:
        return Loader(
            dataset,
            batch_size=self.batch_size,
            workers=self.workers,
            shared=self.shared,
            persistent_workers=self.workers > 0,
            generator=torch.Generator(),  # a loader that begins would otherwise draw from the one that dropout draws from
            pin_memory=self.pin,
            worker_init_fn=begin_worker,
            multiprocessing_context=_workers_context() if self.workers else None,
            **options,
        )


IN_MEMORY = 1 << 30
"""Bytes of decoded images that `data.memory: auto` keeps. Not a share of what is free: the same data give the same pixels anywhere, where
a JPEG that is decoded at a reduced scale differs by some grey levels from one that is decoded whole."""


def fits_memory(samples: Sequence[Sample]) -> bool:
    """Whether the images, decoded, take at most IN_MEMORY, and have one size, as far as 100 of them tell."""
    shown = [sample for sample in samples if sample.has_image]
    sizes = {image_size(sample.read()) for sample in shown[:: max(1, len(shown) // 100)]}
    return len(sizes) == 1 and 3 * math.prod(sizes.pop()) * len(samples) <= IN_MEMORY


def decoded(samples: Sequence[Sample], use: Callable[[bytes], np.ndarray], what: str) -> list[np.ndarray]:
    """`use` on every sample's bytes, on all cores: uint8 H×W×3 each. DataError names a file that cannot be read."""
    from tqdm import tqdm

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda sample: named(sample, use), samples)
        return list(tqdm(results, what, len(samples), disable=None, leave=False))


def _workers_context() -> Any:
    """Workers start from a clean server process, not as forks of this one.

    A fork takes along the locks of the threads that OpenCV and OpenMP run here, but not the threads, and then waits for ever.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([TrainDataset.__module__])  # PyTorch is imported once, there, not once a worker
    return context
