"""Read new data for a comparison: images or texts of any classes, with or without labels, also where training would refuse them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.manifest import Sample
from refract.pipeline.data.sources import open_source
from refract.pipeline.data.sources.folders import label_of, no_images, split_of
from refract.pipeline.data.sources.source import Rows

MOST = 2000
"""The largest number of samples, drawn at random: enough to detect small drift, and a bound on the time for large data."""


class NewData(NamedTuple):
    """names: the class names of each sample, None without labels that the bundle could know."""

    samples: list[Sample]
    names: list[tuple[str, ...]] | None

    def drawn(self, count: int, seed: int = 0) -> "NewData":
        """Return at most `count` samples, drawn at random; 0 for all."""
        if not 0 < count < len(self.samples):
            return self
        indices = np.sort(np.random.default_rng(seed).permutation(len(self.samples))[:count]).tolist()
        names = None if self.names is None else [self.names[i] for i in indices]
        return NewData([self.samples[i] for i in indices], names)


def read_data(source: str, labels: Sequence[str], *, multilabel: bool, unlabelled: bool = False) -> NewData:
    """Read `digits`, a folder of images, one with CLASS/… or SPLIT/CLASS/…, or a table with `path` or `text`, perhaps `label`.

    Subfolders are classes if at least one has the name of a label in `labels`. unlabelled: they never are. DataError for unusable data.
    """
    rows = open_source(source).rows(labelled=False)
    if not len(rows):
        raise no_images(rows.source)
    texts = [""] * len(rows) if rows.texts is None else rows.texts
    images = [None] * len(rows) if rows.images is None else rows.images
    samples = [
        Sample(rows.file(row), (), text=texts[row], data=images[row], has_image=rows.has_image(row))
        for row in range(len(rows))
    ]
    empty = [row for row, sample in enumerate(samples) if not sample.has_image and not trimmed(sample.text)]
    if empty:
        raise DataError(f"{rows.where(empty[0])}: neither a path nor a text ({len(empty)} such rows)")
    return NewData(samples, None if unlabelled else _names(rows, labels, multilabel))


def _names(rows: Rows, labels: Sequence[str], multilabel: bool) -> list[tuple[str, ...]] | None:
    if rows.labels is None:
        return _names_of_folders(rows, labels) if rows.folder and not multilabel else None
    if not any(label.strip() for label in rows.labels):
        return None
    parts = [label.split(";") if multilabel else [label] for label in rows.labels]
    return [tuple(name.strip() for name in row if name.strip()) for row in parts]


def _names_of_folders(rows: Rows, labels: Sequence[str]) -> list[tuple[str, ...]] | None:
    """Return the name of each image's folder below the root, or below its split folder; None if no such name is a label."""
    parts = [Path(path).relative_to(rows.folder).parts[:-1] for path in rows.paths]
    depth = 1 if all(part and split_of(part[0]) for part in parts) else 0
    known = {label_of(label): label for label in labels}
    if any(len(part) <= depth for part in parts) or not {label_of(part[depth]) for part in parts} & {*known}:
        return None
    names = (label_of(part[depth]) for part in parts)
    return [(known.get(name, name),) for name in names]
