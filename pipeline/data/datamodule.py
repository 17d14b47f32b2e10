"""The Lightning DataModule: augmented training batches and preprocessed evaluation batches, uint8 until they reach the device."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from refract.augment import Augmenter, Preprocess, decode, image_size
from refract.cores import cores, mapped
from refract.models.multimodal.tokens import Tokens
from refract.models.training.lightning_imports import lightning
from refract.pipeline.data import encoded_batches
from refract.pipeline.data.datasets import ImageDataset, Item, TrainDataset, collate, init_worker, named, targets_of
from refract.pipeline.data.loader import MOST_WORKERS, Loader, plan_workers, shared_memory_free
from refract.pipeline.data.manifest import DataError, Manifest, Sample
from refract.pipeline.data.train_order import RankShard, TrainOrder
from refract.pipeline.processes import worker_context
from refract.progress import tracked

HOST = ("indices", "repeats", *encoded_batches.STORED)
"""Entries of a batch that stay in host memory: the samples' indices, the keys of their draws, and encoded images."""


class ImageDataModule(lightning.LightningDataModule):
    """Provide batches for training and evaluation.

    A batch has `images` uint8 B×3×H×W, `targets` int64 (B,) or float32 B×C (multilabel), and `indices` int64 (B,). Training batches also
    have `repeats` int64 (B,). Batches for text networks have `texts` int32 B×L (see `refract.models.multimodal.tokens`) and `has_image`
    bool (B,).
    """

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
        decode_on: str = "workers",
        tokens: Tokens | None = None,
        reads_images: bool = True,
    ) -> None:
        """repeats, balanced: see `TrainOrder`. views: see `TrainDataset`. memory: "always" keeps decoded images in memory, "never" does
        not, "auto" does so if `fits_memory`. on_device: augment batches of images in memory by the batch executor, on the device.
        decode_on: "device" decodes and augments other training images on the device, too, if `can_decode_on_device`.
        workers: number of loader processes; None uses 0 for images in memory, else one per core, at most 8. tokens: tokenizer of a network
        that reads texts; reads_images: whether the network reads images. DataError for balanced multilabel data."""
        super().__init__()
        self.manifest, self.preprocess, self.batch_size = manifest, preprocess, batch_size
        train, targets = manifest.of("train"), targets_of(manifest.of("train"), manifest)
        if balanced and targets.ndim > 1:
            raise DataError(
                "data.sampler: balanced needs one label per image; for multilabel set loss.class_weights: balanced"
            )
        self.tokens, self.reads_images = tokens, reads_images
        self.in_memory = reads_images and (memory == "always" or (memory == "auto" and fits_memory(manifest.samples)))
        if workers is None:
            first = next((sample for sample in manifest.samples if sample.has_image), None)
            no_files = not reads_images or first is None or first.data is not None
            workers = 0 if self.in_memory or no_files else min(MOST_WORKERS, cores())
        self.can_decode_on_device = reads_images and not self.in_memory and not views
        encoded = decode_on == "device" and self.can_decode_on_device
        self.workers, self.shared = plan_workers(
            workers, self._batch_bytes(augmenter, views, encoded), shared_memory_free()
        )
        decode_whole = partial(decode, color_profile=augmenter.color_profile)
        pixels = decoded(train, decode_whole, "decoding") if self.in_memory else None
        same_size = pixels is not None and len({image.shape for image in pixels}) == 1
        self.train_set = TrainDataset(
            train, augmenter, targets, views=views, decoded=pixels, raw=on_device and same_size and not views,
            encoded=encoded, tokens=tokens, reads_images=reads_images,
        )  # fmt: skip
        self.order = TrainOrder(
            len(train), seed=augmenter.seed, repeats=repeats, classes=targets.tolist() if balanced else None
        )
        self.pin = torch.cuda.is_available()
        self._evaluation_sets: dict[str, ImageDataset] = {}
        self._pixels: torch.Tensor | None = None  # N×3×H×W, on the device where training images are augmented

    def train_dataloader(self) -> DataLoader[Item]:
        self.order.rank, self.order.world_size = self._rank()
        drops_last = self._drops_last(len(self.order))
        return self._loader(self.train_set, sampler=self.order, drop_last=drops_last, stack=self.stack)

    @property
    def stack(self) -> Callable[[Sequence[Item]], Item]:
        """What makes a batch of training items."""
        return encoded_batches.collate_encoded if self.train_set.encoded else collate

    def decode_on(self, place: str) -> None:
        """Decode the training images of later loaders on the `device`, if `can_decode_on_device`, or in `workers`."""
        self.train_set.encoded = place == "device" and self.can_decode_on_device

    def _drops_last(self, count: int) -> bool:
        """Whether the last batch of an epoch is dropped: batch normalisation cannot learn from a batch of one."""
        return count > self.batch_size and count % self.batch_size == 1

    def val_dataloader(self) -> DataLoader[Item]:
        return self.loader_of("val")

    def images_of(self, split: str) -> ImageDataset:
        """Return the preprocessed images of a split."""
        if split not in self._evaluation_sets:
            samples = self.manifest.of(split)
            pixels = decoded(samples, self.preprocess, "preprocessing") if self.in_memory else None
            targets = targets_of(samples, self.manifest)
            self._evaluation_sets[split] = ImageDataset(
                samples, self.preprocess, targets, pixels, tokens=self.tokens, reads_images=self.reads_images
            )
        return self._evaluation_sets[split]

    def loader_of(self, split: str) -> DataLoader[Item]:
        dataset = self.images_of(split)
        return self._loader(dataset, sampler=RankShard(len(dataset), *self._rank()))

    def state_dict(self) -> dict[str, int]:
        """Return the training progress: the epoch, the samples of it that each rank has seen, and the number of ranks."""
        assert self.trainer is not None
        progress, ranks = self.trainer.fit_loop.epoch_loop.batch_progress, self.trainer.world_size
        if progress.is_last_batch:
            return {"epoch": self.trainer.current_epoch + 1, "seen": 0, "ranks": ranks}
        seen = progress.current.ready * self.batch_size
        return {"epoch": self.trainer.current_epoch, "seen": seen, "ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume from a stored progress, which another number of ranks may have made."""
        self.order.resume(state_dict["epoch"], state_dict["seen"] * state_dict.get("ranks", self._rank()[1]))

    def batches_after(self, seen: int) -> int:
        """Return the number of batches in which each rank sees `seen` samples of the epoch's common order."""
        return seen // (self._rank()[1] * self.batch_size)

    def validation_batches_of_rank_0(self) -> int:
        """Return the number of validation batches of rank 0, which has the most."""
        return -(-len(range(0, len(self.manifest.of("val")), self._rank()[1])) // self.batch_size)

    def batches_per_epoch(self) -> int:
        """Return the number of training batches of each rank in an epoch."""
        self.order.rank, self.order.world_size = self._rank()
        count, size = len(self.order), self.batch_size
        return count // size if self._drops_last(count) else -(-count // size)

    def _batch_bytes(self, augmenter: Augmenter, views: bool, encoded: bool) -> int:
        """Return the size of the largest batch that workers transfer, with a small allowance for texts and labels.

        encoded: training batches have files, whose size is estimated, or finished images.
        """
        height, width = augmenter.size or (self.preprocess.height, self.preprocess.width)
        trained = height * width * (3 if views else 1)
        pixels = max(trained, self.preprocess.height * self.preprocess.width) if self.reads_images else 0
        return self.batch_size * (max(3 * pixels, encoded_batches.BYTES if encoded else 0) + 4096)

    def _rank(self) -> tuple[int, int]:
        """Return (rank, world size) of this process."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def transfer_batch_to_device(self, batch: Item, device: torch.device, dataloader_idx: int) -> Item:
        """Copy a batch to the device, except HOST: reading these entries back would make the CPU wait for the device."""
        on_host = {name: batch[name] for name in HOST if name in batch}
        moved = {name: value for name, value in batch.items() if name not in HOST}
        return {**super().transfer_batch_to_device(moved, device, dataloader_idx), **on_host}

    def on_after_batch_transfer(self, batch: Item, dataloader_idx: int) -> Item:
        """Augment the batch's images on its device: those of its keys in memory, or its encoded images."""
        device = batch["targets"].device
        if "headers" in batch:
            images = encoded_batches.augmented(batch, self.train_set, device)
            return {**{k: v for k, v in batch.items() if k not in encoded_batches.STORED}, "images": images}
        keys = batch.pop("keys", None)
        if keys is None:
            return batch
        from refract.augment.executors import torch_batch as executor

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
        """Return all training images: on the device if they fit half of its free memory, else on the host."""
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
            generator=torch.Generator(),  # otherwise a starting loader draws from the generator of dropout
            pin_memory=self.pin,
            worker_init_fn=init_worker,
            multiprocessing_context=worker_context(TrainDataset.__module__) if self.workers else None,
            **options,
        )


IN_MEMORY = 1 << 30
"""Bytes of decoded images that `data.memory: auto` keeps. It is a constant, not a fraction of the free memory, so that every machine trains
on the same pixels: a JPEG decoded at a reduced scale differs by some grey levels from one decoded whole."""


def fits_memory(samples: Sequence[Sample]) -> bool:
    """Return whether the decoded images have one size and take at most IN_MEMORY, estimated from about 100 of them."""
    with_image = [sample for sample in samples if sample.has_image]
    sizes = {image_size(sample.read()) for sample in with_image[:: max(1, len(with_image) // 100)]}
    return len(sizes) == 1 and 3 * math.prod(sizes.pop()) * len(samples) <= IN_MEMORY


def decoded(samples: Sequence[Sample], use: Callable[[bytes], np.ndarray], title: str) -> list[np.ndarray]:
    """Apply `use` to the bytes of every sample, on all cores. Returns uint8 H×W×3 arrays. DataError names an unreadable file."""
    return list(tracked(mapped(lambda sample: named(sample, use), samples), title, len(samples)))
