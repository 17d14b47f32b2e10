"""Survey a data set and this machine: label counts, image sizes and content, device, and the pretrained weights on it."""

import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from refract.augment import ImageError, image_size
from refract.augment.decoding.decode import decode_part
from refract.augment.decoding.jpeg import SCALES, Part
from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data import storage
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.data.sources.folders import hidden_lines, skipped_lines
from refract.pipeline.data.validation import remark_lines
from refract.pipeline.suggest.backbones import Backbone, backbones_present
from refract.pipeline.suggest.content import SIDE, Content, content_of, thumbnail

HEADERS, DECODED, FEWEST, SECONDS = 300, 200, 24, 2.0
"""Image headers that are read; images that are decoded at most, and at least, regardless of time; time limit of decoding in seconds."""

VAL_FRACTION, TEST_FRACTION = 0.1, 0.2
"""Fractions that the proposed config draws for missing splits."""

SMALL = 64
"""Image side in pixels below which networks for small images are proposed."""

FEW = 50
"""Training samples per class below which the data is few."""

LEAST_ENLARGED = 28
"""Image side in pixels from which enlarging for a pretrained network is considered."""


@dataclass(frozen=True)
class Survey:
    """The result of `take_survey`.

    source, task, labels: those of the manifest; counts: samples per label; splits: samples per split, empty if the data has no splits;
    training: approximate number of training samples; images, texts: samples with an image or a text; side: median of the shorter sides in
    pixels, 0 without images; sizes: range of the sizes, in words; content: see `content_of`; device: cpu or cuda; backbones: those with
    pretrained weights on this machine; unreadable: unreadable images among those examined; refused: whether training rejects the data
    until the user fixes it; notes: notes for the user.
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
    backbones: tuple[Backbone, ...]
    unreadable: int = 0
    refused: bool = False
    notes: tuple[str, ...] = ()

    @property
    def small(self) -> bool:
        """Whether the median shorter side is below SMALL."""
        return self.side < SMALL

    @property
    def few(self) -> bool:
        """Whether a class has fewer training samples than FEW, in the median."""
        return self.per_class < FEW

    @property
    def per_class(self) -> int:
        """Median number of training samples per class."""
        fraction = self.training / max(1, self.samples)
        return int(median(self.counts.values()) * fraction) if self.counts else 0


def take_survey(manifest: Manifest) -> Survey:
    """Read up to HEADERS headers, decode up to DECODED images at reduced size in about SECONDS, and inspect the machine.

    ImageError if no image can be read.
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
        backbones=backbones_present(),
        unreadable=bad,
        refused=bool(refusals),
        notes=(*notes, *refusals, *_split_notes(manifest), *_folder_notes(manifest)),
    )


def _training(samples: int, splits: dict[str, int]) -> int:
    """Return the number of training samples after missing splits are drawn."""
    drawn = (0.0 if "val" in splits else VAL_FRACTION) + (0.0 if "test" in splits else TEST_FRACTION)
    return round(splits.get("train", samples) * (1 - drawn))


def _look(manifest: Manifest, samples: list[Sample]) -> tuple[list[tuple[int, int]], Content, int, list[str]]:
    """Return (sizes, content, number of unreadable images, notes), from images in a fixed random order that mixes the classes."""
    order = np.random.default_rng(0).permutation(len(samples))[:HEADERS]
    end = time.monotonic() + SECONDS
    sizes: list[tuple[int, int]] = []
    thumbnails, labels, bad = list[np.ndarray](), list[str](), list[tuple[str, str]]()
    remarks: dict[str, str] = {}
    for index in order.tolist():
        sample = samples[index]
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
        path, reason = bad[0]
        raise ImageError(f"{manifest.source}: all {len(bad)} examined images are unreadable, such as {path}: {reason}")
    notes = [*_unreadable_notes(bad, len(order)), *(f"note: {line}" for line in remark_lines(remarks))]
    return sizes, content_of(thumbnails, labels), len(bad), notes


def _reduced(data: bytes, size: tuple[int, int]) -> Part:
    """Decode an image; a JPEG at the smallest scale with at least two pixels per thumbnail pixel."""
    scale = max(scale for scale in SCALES if scale == 1 or min(size) >= 2 * SIDE * scale)
    return decode_part(data, None, size=size, scale=scale)


def _header(sample: Sample) -> bytes:
    """Return the start of the file with its header: reading whole photos for their sizes is slow on a network drive."""
    if sample.data is not None:
        return sample.data
    with storage.open_stored(sample.path) as file:
        start = file.read(1 << 16)
        try:
            image_size(start)
            return start
        except ImageError:  # a longer header, or a TIFF, whose directory is at the end
            return start + file.read()


def _in_words(sizes: list[tuple[int, int]]) -> str:
    if not sizes:
        return ""
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    if len(set(sizes)) == 1:
        return f"{heights[0]}×{widths[0]}"
    return f"{min(heights)}×{min(widths)} to {max(heights)}×{max(widths)}"


def _unreadable_notes(bad: list[tuple[str, str]], examined: int) -> list[str]:
    if not bad:
        return []
    path, reason = bad[0]
    return [
        f"note: {len(bad)} of the {examined} examined images are unreadable, such as {path}: {reason}; training lists all of them, and "
        "data.on_bad_file: skip skips them"
    ]


def _refusal_notes(manifest: Manifest) -> list[str]:
    """Return the problems that `refract.pipeline.data.validation.check_classes` will reject, as far as headers show them."""
    notes = []
    if manifest.empty:
        count = len(manifest.empty)
        which = f"{count} class folders are empty, such as" if count > 1 else "empty class folder:"
        notes.append(f"note: {which} {manifest.empty[0]}; training rejects {'them' if count > 1 else 'it'}")
    train_counts = manifest.counts("train") if "train" in manifest.splits() else manifest.counts()
    untrained = {index for index, label in enumerate(manifest.labels) if not train_counts[label]}
    measured = [sample for sample in manifest.samples if untrained.intersection(sample.labels)]
    if measured:
        count = len({index for sample in measured for index in sample.labels} & untrained)
        notes.append(
            f"note: {count} classes have no training sample, such as that of {measured[0].path}; training rejects them; "
            "add training samples, or move images without a label elsewhere"
        )
    single = [label for label, number in manifest.counts().items() if number == 1]
    if single:
        notes.append(
            f"note: classes with one sample, such as {single[0]}, cannot be both trained and measured; add samples"
        )
    return notes


def _split_notes(manifest: Manifest) -> list[str]:
    """Return notes on the splits that training will draw from the split train, if the data has other splits."""
    present = manifest.splits()
    remaining, notes = len(manifest.of("train")), []
    for split, fraction in (("test", TEST_FRACTION), ("val", VAL_FRACTION)):
        if present and split not in present:
            notes.append(
                f"note: no split {split}: training draws about {round(fraction * remaining):,} of the training samples for it"
            )
    return notes


def _folder_notes(manifest: Manifest) -> list[str]:
    notes = []
    if manifest.loose:
        notes.append(
            f"note: {len(manifest.loose)} images are outside the class folders, such as {manifest.loose[0]}; training skips them"
        )
    skipped = [*skipped_lines(manifest.skipped), *hidden_lines(manifest.skipped)]
    return [
        *notes,
        *(f"note: {line}" for line in manifest.notes),
        *(f"note: {line}; training skips them" for line in skipped),
    ]
