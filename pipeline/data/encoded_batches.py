"""Training batches of JPEG files, which the device decodes and augments: workers only read them.

A worker finishes the images that a device does not decode (see `refract.augment.executors.jpeg_batch`), so that a batch may have both.
"""

import logging
import threading
from collections.abc import Sequence

import torch

from refract.augment import ImageError
from refract.augment.executors import jpeg_batch
from refract.augment.on_device import on_device
from refract.pipeline.data.datasets import Item, TrainDataset, collate

log = logging.getLogger(__name__)

BYTES = 256 << 10
"""Estimated size of an encoded image, for the shared memory of a loader's batches. A larger batch is sent through a pipe if need be."""

STORED = ("jpegs", "headers", "keys")
"""Entries of such a batch in place of `images`; they stay in host memory."""

_OF_ONE = ("images", "jpeg", "header")


def collate_encoded(items: Sequence[Item]) -> Item:
    """Stack the items of a `TrainDataset` with `encoded` to a batch.

    `headers` int64 (B, 4) has for each sample the bytes of its file, and (height, width, orientation); zeros for a finished image. `jpegs`
    uint8 (bytes,) joins the files, `images` uint8 (F, 3, H, W) stacks the finished images; each is absent without samples. `keys` int64
    (B, 3) are (epoch, index, repeat).
    """
    batch = collate([{name: value for name, value in item.items() if name not in _OF_ONE} for item in items])
    batch["headers"] = torch.tensor([item.get("header", (0, 0, 0, 0)) for item in items], dtype=torch.int64)
    if files := bytearray().join(item["jpeg"] for item in items if "jpeg" in item):
        batch["jpegs"] = torch.frombuffer(files, dtype=torch.uint8)
    if finished := [{"images": item["images"]} for item in items if "images" in item]:
        batch["images"] = collate(finished)["images"]
    return batch


def augmented(batch: Item, dataset: TrainDataset, device: torch.device) -> torch.Tensor:
    """Return the images of a batch of `collate_encoded`, uint8 B×3×H×W on the device. DataError as `TrainDataset`.

    If the device cannot decode one of the files, the CPU computes the whole batch.
    """
    try:
        return images_by_device(batch, dataset, device)
    except ImageError as error:
        if not _warned.is_set():
            _warned.set()
            log.warning("%s; the training process decodes such batches; data.decode_on: workers avoids that", error)
    items = [{"images": dataset.image((epoch, index, repeat))} for epoch, index, repeat in batch["keys"].tolist()]
    images: torch.Tensor = collate(items)["images"].to(device)
    return images


_warned = threading.Event()


def images_by_device(batch: Item, dataset: TrainDataset, device: torch.device) -> torch.Tensor:
    """Return the images as `augmented` does; ImageError if the device cannot decode one of the files."""
    headers, keys = batch["headers"].tolist(), batch["keys"].tolist()
    encoded = [row for row, header in enumerate(headers) if header[0]]
    if not encoded:
        finished: torch.Tensor = batch["images"]
        return finished
    files = batch["jpegs"].split([headers[row][0] for row in encoded])
    plans = [
        dataset.augmenter.draw((height, width), epoch=epoch, index=index, repeat=repeat)
        for (_, height, width, _), (epoch, index, repeat) in ((headers[row], keys[row]) for row in encoded)
    ]
    results = jpeg_batch.run(plans, files, [headers[row][3] for row in encoded], device)
    if len(encoded) == len(headers):
        return results
    others = [row for row, header in enumerate(headers) if not header[0]]
    images = results.new_empty((len(headers), *results.shape[1:]))
    images.index_copy_(0, on_device(encoded, device), results)
    return images.index_copy_(0, on_device(others, device), batch["images"])
