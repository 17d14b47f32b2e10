"""Read new data for a comparison: images or texts of any classes, with or without labels, also where training would refuse them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refract.augment.decoding.decode import SUFFIXES
from refract.augment.image_files import walk
from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.manifest import Sample, load_manifest
from refract.pipeline.data.sources.folders import label_of, split_of, unreadable
from refract.pipeline.data.sources.tables import is_table, read_table

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
    path = Path(source)
    if path.is_dir():
        data = _from_folder(path, labels, unlabelled or multilabel)
    elif is_table(path):
        data = _from_table(path, multilabel)
    else:
        manifest = load_manifest(source)  # digits; DataError for anything else
        data = NewData(list(manifest.samples), [tuple(manifest.labels[i] for i in s.labels) for s in manifest.samples])
    return data._replace(names=None) if unlabelled else data


def _from_folder(root: Path, labels: Sequence[str], unlabelled: bool) -> NewData:
    try:
        files = walk(root).images
    except OSError as error:
        raise unreadable(error, root) from error
    if not files:
        raise DataError(f"{root}: no images in this folder; Refract reads {', '.join(SUFFIXES)}")
    samples = [Sample(str(Path(file)), ()) for file in files]
    parts = [Path(file).relative_to(root).parts[:-1] for file in files]
    depth = 1 if all(part and split_of(part[0]) for part in parts) else 0
    known = {label_of(label): label for label in labels}
    if (
        unlabelled
        or any(len(part) <= depth for part in parts)
        or not {label_of(part[depth]) for part in parts} & {*known}
    ):
        return NewData(samples, None)
    names = (label_of(part[depth]) for part in parts)
    return NewData(samples, [(known.get(name, name),) for name in names])


def _from_table(path: Path, multilabel: bool) -> NewData:
    table = read_table(path)
    if not {"path", "text"} & {*table.columns}:
        raise table.lacks("path", "text", needed="path and/or text[,label]")
    samples = [
        Sample(
            table.file(file) if file.strip() else f"{path.name}#{row}",
            (),
            text=text,
            has_image=bool(file.strip()),
        )
        for row, (file, text) in enumerate(zip(table.texts("path"), table.texts("text"), strict=True), start=2)
    ]
    empty = [row for row, sample in enumerate(samples) if not sample.has_image and not trimmed(sample.text)]
    if empty:
        raise DataError(f"{table.where(empty[0])}: neither a path nor a text ({len(empty)} such rows)")
    truths = table.texts("label")
    if not any(label.strip() for label in truths):
        return NewData(samples, None)
    rows = [label.split(";") if multilabel else [label] for label in truths]
    return NewData(samples, [tuple(name.strip() for name in row if name.strip()) for row in rows])
