"""Load a data set to train on or to measure: samples with labels and splits, from any source."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import repeat
from pathlib import Path

import numpy as np

from refract.augment.decoding.decode import SUFFIXES
from refract.augment.image_files import Skipped
from refract.models.hierarchy import Hierarchy
from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data import storage
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources import open_source
from refract.pipeline.data.sources.folders import SPLITS, inner_hint, shown_twin, trimmed_name, twins
from refract.pipeline.data.sources.source import Rows


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with or without a text, or a text alone.

    path: the image file, or a name if `data` holds the encoded bytes; labels: label indices; split: "" if not given; has_image: false for
    a text alone, whose image is a grey placeholder; metadata: further columns of the manifest, column → value.
    """

    path: str
    labels: tuple[int, ...]
    split: str = ""
    text: str = ""
    data: bytes | None = field(default=None, repr=False)
    has_image: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """Identity of the sample: path and text, as an image may occur with several texts."""
        return f"{self.path}\0{self.text}" if self.text else self.path

    def with_split(self, split: str) -> "Sample":
        """Return the sample in another split. It takes a tenth of the time of `dataclasses.replace`."""
        return Sample(self.path, self.labels, split, self.text, self.data, self.has_image, self.metadata)

    def read(self) -> bytes:
        """Return the encoded image. OSError if the file cannot be read."""
        return storage.read(self.path) if self.data is None else self.data


@dataclass(frozen=True)
class Manifest:
    """A data set.

    source: path as the user gave it, or `digits`; labels: names, sorted; task: binary, multiclass or multilabel.
    """

    source: str
    samples: tuple[Sample, ...]
    labels: tuple[str, ...]
    task: str
    empty: tuple[str, ...] = ()
    """Class folders without images."""
    loose: tuple[str, ...] = ()
    """Images outside the class folders, which have no class."""
    skipped: Skipped = field(default_factory=Skipped, hash=False)
    """Skipped entries of the folder."""
    notes: tuple[str, ...] = ()
    """Notes for the user, one line each."""
    near: tuple[tuple[str, str], ...] = ()
    """(path of a `val` or `test` image, path of the near-duplicate in `train`): see `refract.pipeline.data.near_duplicates`."""
    drawn: tuple[str, ...] = ()
    """Splits that the data lacks and that were drawn from the seed."""
    hierarchy: Hierarchy | None = field(default=None, hash=False)
    """The class hierarchy of `data.hierarchy`."""

    def of(self, split: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.split == split]

    def splits(self) -> list[str]:
        """The splits that hold samples, in the order train, val, test."""
        present = {sample.split for sample in self.samples}
        return [split for split in SPLITS if split in present]

    def counts(self, split: str | None = None) -> dict[str, int]:
        """Return label → number of its samples, in a split or in all."""
        counter = Counter(i for s in self.samples if split is None or s.split == split for i in s.labels)
        return {label: counter[i] for i, label in enumerate(self.labels)}

    def near_of(self, samples: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
        """Return (sample, its near-duplicate in `train`) for each of the samples that `near` lists by path."""
        by_path, wanted = {sample.path: sample for sample in self.samples}, {sample.path for sample in samples}
        return [(by_path[path], by_path[other]) for path, other in self.near if path in wanted]

    def with_samples(self, samples: Sequence[Sample]) -> "Manifest":
        return replace(self, samples=tuple(samples))


def load_manifest(source: str | Path, task: str = "auto", *, to_train: bool = True) -> Manifest:
    """Read a data set.

    source: `digits`, a folder, a `.csv`, `.tsv` or `.parquet` file, or `NAME:ARGUMENT` of a plugin's source. to_train: also reject data
    with splits but without a split train, and data with a single class. DataError names the problem.
    """
    manifest = _load(source, task)
    if to_train:
        reject_untrainable(manifest)
    return manifest


def _load(source: str | Path, task: str) -> Manifest:
    opened = open_source(source)
    opened.check_task(task)
    rows = opened.rows(labelled=True)
    _check_rows(rows)
    written = rows.labels or [""] * len(rows)
    multilabel = task == "multilabel" or (task == "auto" and any(";" in label for label in written))
    if multilabel:
        names = [
            tuple(dict.fromkeys(part for part in map(trimmed_name, label.split(";")) if part)) for label in written
        ]
    else:
        names = [(label,) for label in written]
        _reject_rows(
            rows, "label", written, lambda label: label == "", "a class name",
            "for multi-label images or images without a label, write labels as `a;b` and set data.task: multilabel",
        )  # fmt: skip
    labels = tuple(sorted({*rows.classes, *(name for row in names for name in row)}))
    manifest = _manifest(rows.source, _samples(rows, names, labels), labels, "multilabel" if multilabel else task)
    joined = [] if rows.folder else _joined_note(labels, "" if multilabel else " and set data.task: multilabel")
    return replace(
        manifest,
        empty=rows.empty,
        loose=rows.loose,
        skipped=rows.skipped,
        notes=(*rows.notes, *_unlabelled(rows, names), *joined, *manifest.notes),
    )


def _check_rows(rows: Rows) -> None:
    """Raise DataError for an unknown split, a split that only some rows have, and a row with neither an image nor a text."""
    if rows.splits is not None:
        splits = rows.splits
        known = f"one of {', '.join(SPLITS)}, or empty"
        _reject_rows(rows, "split", splits, lambda split: split not in (*SPLITS, ""), known)
        if any(splits):
            _reject_rows(rows, "split", splits, lambda split: split == "", "filled, as in other rows")
    texts = rows.texts
    blank = [row for row in range(len(rows)) if not rows.has_image(row) and (texts is None or not trimmed(texts[row]))]
    if blank:
        raise DataError(
            f"{rows.where(blank[0])}: path {rows.paths[blank[0]]!r} is empty, and so is the text ({len(blank)} such rows)"
        )


def _samples(rows: Rows, names: Sequence[tuple[str, ...]], labels: Sequence[str]) -> list[Sample]:
    index = {label: i for i, label in enumerate(labels)}
    numbers = {
        row: tuple(index[name] for name in row) for row in set(names)
    }  # shared by the samples, which may be millions
    splits, texts = ([""] * len(rows) if column is None else column for column in (rows.splits, rows.texts))
    metadata: Iterable[dict[str, str]] = repeat({}, len(rows))
    if rows.metadata:
        columns = zip(*rows.metadata.values(), strict=True)
        metadata = (dict(zip(rows.metadata, values, strict=True)) for values in columns)
    return [
        Sample(
            rows.file(row), numbers[names[row]], splits[row], texts[row],
            _embedded(rows, row), rows.has_image(row), metadata=facts,
        )
        for row, facts in enumerate(metadata)
    ]  # fmt: skip


def _embedded(rows: Rows, row: int) -> bytes | None:
    if not rows.has_image(row):
        return _blank()
    return None if rows.images is None else rows.images[row]


def _joined_note(labels: Sequence[str], hint: str) -> list[str]:
    """Return a note on labels such as `circle,square` whose parts are also labels, or occur in other labels. hint: end of the note."""
    for mark in (",", "|", "/", " "):
        parts = {label: [*map(trimmed_name, label.split(mark))] for label in labels}
        occurrences = Counter(part for pieces in parts.values() for part in {*pieces})
        joined = [
            label
            for label, pieces in parts.items()
            if len({*pieces}) > 1
            and all(part and (part in parts or (mark in ",|" and occurrences[part] > 1)) for part in pieces)
        ]
        if joined:
            return [
                f"{joined[0]} looks like multiple labels of one image ({len(joined)} such labels); if so, write "
                f"{';'.join(parts[joined[0]])}{hint}"
            ]
    return []


def _unlabelled(rows: Rows, names: Sequence[tuple[str, ...]]) -> list[str]:
    unlabelled = [row for row, row_names in enumerate(names) if not row_names]
    return (
        [
            f"{len(unlabelled)} rows have no label, such as {rows.where(unlabelled[0])}; they are trained on as samples without labels"
        ]
        if unlabelled
        else []
    )


def _manifest(source: str, samples: list[Sample], labels: tuple[str, ...], task: str) -> Manifest:
    if not samples:
        raise DataError(f"{source}: no images; accepted: {', '.join(SUFFIXES)}")
    unnamable = [sample.path for sample in samples if not _is_text(sample.path)]
    if unnamable:
        raise DataError(
            f"{source}: {len(unnamable)} file names are not UTF-8, such as {os.fsencode(unnamable[0])!r}; reports need UTF-8; "
            "rename them (for Latin-1: `convmv -r -f latin1 -t utf8 --notest FOLDER`)"
        )
    if task == "auto":
        task = "binary" if len(labels) == 2 else "multiclass"
    if task == "binary" and len(labels) != 2:
        raise DataError(
            f"{source}: data.task is binary, but the data has {len(labels)} classes: {', '.join(labels[:10])}; "
            "set data.task: multiclass"
        )
    return Manifest(source, tuple(samples), labels, task, notes=tuple(_twin_notes(labels)))


def _twin_notes(labels: Sequence[str]) -> list[str]:
    groups: dict[str, list[list[str]]] = defaultdict(list)
    for difference, group in twins(labels):
        groups[difference].append(group)
    return [
        f"{' and '.join(map(shown_twin, alike[0]))} are {len(alike[0])} classes and differ in {difference} only "
        f"({len(alike)} such names)"
        for difference, alike in groups.items()
    ]


def reject_untrainable(manifest: Manifest) -> None:
    """Raise DataError for data with splits but without a split train, and for data with a single class."""
    splits = manifest.splits()
    if splits and "train" not in splits:
        raise DataError(f"{manifest.source}: has images of the split {', '.join(splits)}, and none of the split train")
    filled = [label for label, count in manifest.counts().items() if count]
    if len(filled) < 2 and manifest.task != "multilabel":
        empty = f", and {len(manifest.empty)} empty class folders such as {manifest.empty[0]}" if manifest.empty else ""
        hint = inner_hint(manifest.source) if Path(manifest.source).is_dir() else ""
        raise DataError(
            f"{manifest.source}: only one class ({', '.join(filled)}){empty}; a classifier needs two or more, "
            f"one folder or label for each{hint}"
        )


@cache
def _blank() -> bytes:
    """Return the placeholder image of a text alone: a grey PNG of 32×32 pixels."""
    import cv2

    return cv2.imencode(".png", np.full((32, 32, 3), 128, np.uint8))[1].tobytes()


def _reject_rows(
    rows: Rows, column: str, values: Sequence[str], wrong: Callable[[str], bool], accepted: str, remedy: str = ""
) -> None:
    indices = [row for row, value in enumerate(values) if wrong(value)]
    if indices:
        raise DataError(
            f"{rows.where(indices[0])}: {column} {values[indices[0]]!r} is not {accepted} ({len(indices)} such rows)"
            + (f"; {remedy}" if remedy else "")
        )


def _is_text(path: str) -> bool:
    """Return whether a name from the file system is UTF-8: Python represents other bytes as surrogates."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
