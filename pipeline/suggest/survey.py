"""What a data set and this machine are like: counts, sizes and content of the images, device, and pretrained weights within reach."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from refract.augment import ImageError, image_size
from refract.augment.decoding.decode import decode_part
from refract.augment.decoding.jpeg import SCALES, Part
from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.data.sources.folders import hidden_lines, skipped_lines
from refract.pipeline.data.validation import remark_lines
from refract.pipeline.suggest.content import SIDE, Content, content_of, thumbnail

HEADERS, DECODED, FEWEST, SECONDS = 300, 200, 24, 2.0
"""How many images' headers are read; how many images are decoded at most, and at least, however long it takes; the time for that."""

VAL_SHARE, TEST_SHARE = 0.1, 0.2
"""Fractions that the proposed config draws for the splits that the data does not have."""

SMALL = 64
"""Sides of images, in pixels, below which networks for small images are proposed."""

LEAST_ENLARGED = 28
"""Sides of images, in pixels, from which enlarging them for a pretrained network is considered."""


@dataclass(frozen=True)
class Survey:
    """What `take_survey` found.

    source, task, labels: the manifest's; counts: samples of each label; splits: samples of each split, empty where none are given;
    training: samples that are left to train on, about; images, texts: samples with one; side: median of the shorter sides, pixels, 0
    without images; sizes: range of the sizes, in words; content: see `content_of`; device: cpu or cuda; hub: whether pretrained weights can
    be had; unreadable: images looked at that cannot be read; refused: whether training refuses the data until the user mends it; notes: for
    the user.
    """

    source: str
    task: str
    labels: tuple[str, ...]
    counts: dict[str, int]
    splits: dict[str, int]
    samples: int
    training: int
    images: int
    texts: int
    side: int
    sizes: str
    content: Content
    device: str
    hub: bool
    unreadable: int = 0
    refused: bool = False
    notes: tuple[str, ...] = ()

    @property
    def small(self) -> bool:
        """Whether the images are smaller than SMALL."""
        return self.side < SMALL

    @property
    def per_class(self) -> int:
        """Median number of training samples of a class."""
        fraction = self.training / max(1, self.samples)
        return int(median(self.counts.values()) * fraction) if self.counts else 0


def take_survey(manifest: Manifest) -> Survey:
    """Read up to HEADERS headers and decode up to DECODED images, at reduced size, in about SECONDS; look at the machine.

    ImageError where no image can be read.
    """
    import torch

    has_image = [sample for sample in manifest.samples if sample.has_image]
    sizes, content, bad, notes = _look(manifest, has_image) if has_image else ([], content_of([], []), 0, [])
    refusals = _refusal_notes(manifest)
    side = int(median(min(size) for size in sizes)) if sizes else 0
    splits = {split: len(manifest.of(split)) for split in manifest.splits()}
    return Survey(
        source=manifest.source,
        task=manifest.task,
        labels=manifest.labels,
        counts=manifest.counts(),
        splits=splits,
        samples=len(manifest.samples),
        training=_training(len(manifest.samples), splits),
        images=len(has_image),
        texts=sum(bool(trimmed(sample.text)) for sample in manifest.samples),
        side=side,
        sizes=_in_words(sizes),
        content=content,
        device="cuda" if torch.cuda.is_available() else "cpu",
        hub=side >= LEAST_ENLARGED and not content.glyphs and hub_answers(),
        unreadable=bad,
        refused=bool(refusals),
        notes=(*notes, *refusals, *_split_notes(manifest), *_folder_notes(manifest)),
    )


def _training(samples: int, splits: dict[str, int]) -> int:
    """Samples left to train on: `data.val_fraction` and `data.test_fraction` are drawn where the data has no such split."""
    drawn = (0.0 if "val" in splits else VAL_SHARE) + (0.0 if "test" in splits else TEST_SHARE)
    return round(splits.get("train", samples) * (1 - drawn))


def _look(manifest: Manifest, samples: list[Sample]) -> tuple[list[tuple[int, int]], Content, int, list[str]]:
    """(sizes, content, how many cannot be read, notes) of images in a fixed random order, so that every class is among the first."""
    order = np.random.default_rng(0).permutation(len(samples))[:HEADERS]
    end = time.monotonic() + SECONDS
    sizes: list[tuple[int, int]] = []
    thumbnails, labels, bad = list[np.ndarray](), list[str](), list[tuple[str, str]]()
    remarks: dict[str, str] = {}
    for place in order.tolist():
        sample = samples[place]
        try:
            if len(thumbnails) < (DECODED if time.monotonic() < end else FEWEST):
                data = sample.read()
                size = image_size(data)
                part = _reduced(data, size)
                thumbnails.append(thumbnail(part.pixels))
                if part.remarks:
                    remarks[sample.path] = "; ".join(part.remarks)
                labels.append(manifest.labels[sample.labels[0]] if len(sample.labels) == 1 else "")
            else:
                size = image_size(_header(sample))
            sizes.append(size)
        except (ImageError, OSError) as error:
            bad.append((sample.path, error.strerror or str(error) if isinstance(error, OSError) else str(error)))
    if not sizes:
        path, why = bad[0]
        raise ImageError(
            f"{manifest.source}: none of the {len(bad)} images looked at can be read, such as {path}: {why}"
        )
    notes = [*_unreadable_notes(bad, len(order)), *(f"note: {line}" for line in remark_lines(remarks))]
    return sizes, content_of(thumbnails, labels), len(bad), notes


def _reduced(data: bytes, size: tuple[int, int]) -> Part:
    """A JPEG is decoded at the smallest scale that still has two pixels for each of the thumbnail's."""
    scale = max(scale for scale in SCALES if scale == 1 or min(size) >= 2 * SIDE * scale)
    return decode_part(data, None, size=size, scale=scale)


def _header(sample: Sample) -> bytes:
    """Enough of the file for its header: reading whole photos only for their sizes takes long on a network drive."""
    if sample.data is not None:
        return sample.data
    with Path(sample.path).open("rb") as file:
        start = file.read(1 << 16)
        try:
            image_size(start)
            return start
        except ImageError:  # a header longer than that, or a TIFF, whose directory is at its end
            return start + file.read()


def _in_words(sizes: list[tuple[int, int]]) -> str:
    if not sizes:
        return ""
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    if len(set(sizes)) == 1:
        return f"{heights[0]}×{widths[0]}"
    return f"{min(heights)}×{min(widths)} to {max(heights)}×{max(widths)}"


def _unreadable_notes(bad: list[tuple[str, str]], looked_at: int) -> list[str]:
    if not bad:
        return []
    path, why = bad[0]
    return [
        f"note: {len(bad)} of the {looked_at} images looked at cannot be read, such as {path}: {why}; training lists them all, and "
        "data.on_bad_file: skip leaves them out"
    ]


def _refusal_notes(manifest: Manifest) -> list[str]:
    """What `refract.pipeline.data.validation.check_classes` will refuse, as far as it is known without decoding every image."""
    notes = []
    if manifest.empty:
        notes.append(
            f"note: {len(manifest.empty)} class folders are empty, such as {manifest.empty[0]}; training refuses them"
        )
    trained = manifest.counts("train") if "train" in manifest.splits() else manifest.counts()
    untrained = {place for place, label in enumerate(manifest.labels) if not trained[label]}
    held_out = [sample for sample in manifest.samples if untrained.intersection(sample.labels)]
    if held_out:
        count = len({place for sample in held_out for place in sample.labels} & untrained)
        notes.append(
            f"note: {count} classes have no training sample, such as that of {held_out[0].path}; training refuses them; "
            "add training samples, or move images without a label away"
        )
    single = [label for label, number in manifest.counts().items() if number == 1]
    if single:
        notes.append(f"note: classes with one sample, such as {single[0]}, cannot be trained and measured; add samples")
    return notes


def _split_notes(manifest: Manifest) -> list[str]:
    """Which splits training will draw from the split train, where the data gives others."""
    present = manifest.splits()
    left, notes = len(manifest.of("train")), []
    for split, fraction in (("test", TEST_SHARE), ("val", VAL_SHARE)):
        if present and split not in present:
            notes.append(
                f"note: no split {split}: training draws about {round(fraction * left):,} of the training samples for it"
            )
    return notes


def _folder_notes(manifest: Manifest) -> list[str]:
    notes = []
    if manifest.loose:
        notes.append(
            f"note: {len(manifest.loose)} images lie in no class's folder, such as {manifest.loose[0]}; training skips them"
        )
    skipped = [*skipped_lines(manifest.skipped), *hidden_lines(manifest.skipped)]
    return [
        *notes,
        *(f"note: {line}" for line in manifest.notes),
        *(f"note: {line}; training skips them" for line in skipped),
    ]


def hub_answers() -> bool:
    """Whether pretrained weights can be had: from the cache, or from the network within two seconds."""
    cache = Path(os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch")) / "hub" / "checkpoints"
    if any(cache.glob("resnet18-*.pth")):
        return True
    try:
        socket.create_connection(("download.pytorch.org", 443), timeout=2).close()
        return True
    except OSError:
        return False
