"""What is to be compared: pictures with labels or without, of any classes, as a data set that is to be trained on could not be."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from augment.decode import SUFFIXES
from models.texts.tokens import trimmed
from pipeline.data.manifest import SPLITS, DataError, Sample, load_manifest, read_table

MOST = 2000
"""Pictures that are looked at, drawn from all: enough to tell small drift, and a night's data cost no more than a minute's."""


class NewData(NamedTuple):
    """names: of each sample's classes, None where they have none that the bundle could know."""

    samples: list[Sample]
    names: list[tuple[str, ...]] | None

    def drawn(self, count: int, seed: int = 0) -> "NewData":
        """At most so many of them, at random; 0 for all."""
        if not 0 < count < len(self.samples):
            return self
        places = np.sort(np.random.default_rng(seed).permutation(len(self.samples))[:count]).tolist()
        names = None if self.names is None else [self.names[i] for i in places]
        return NewData([self.samples[i] for i in places], names)


def read_data(source: str, labels: Sequence[str], *, multilabel: bool, unlabelled: bool = False) -> NewData:
    """`digits`, a folder of pictures, one with CLASS/… or SPLIT/CLASS/…, or a CSV or Parquet table with `path` or `text`, perhaps `label`.

    The folders of a folder are classes where at least one is named as one of `labels`. unlabelled: never. DataError.
    """
    path = Path(source)
    if path.is_dir():
        found = _of_folder(path, labels, unlabelled or multilabel)
    elif path.is_file() and path.suffix.lower() in (".csv", ".parquet"):
        found = _of_table(path, multilabel)
    else:
        manifest = load_manifest(source)  # digits, or says what is wrong
        found = NewData(list(manifest.samples), [tuple(manifest.labels[i] for i in s.labels) for s in manifest.samples])
    return found._replace(names=None) if unlabelled else found


def _of_folder(root: Path, labels: Sequence[str], unlabelled: bool) -> NewData:
    files = sorted(
        p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
    )
    if not files:
        raise DataError(f"{root}: no pictures in this folder; Refract reads {', '.join(SUFFIXES)}")
    samples = [Sample(str(file), ()) for file in files]
    parts = [file.relative_to(root).parts[:-1] for file in files]
    depth = 1 if all(part and part[0] in SPLITS for part in parts) else 0
    if unlabelled or any(len(part) <= depth for part in parts) or not {part[depth] for part in parts} & set(labels):
        return NewData(samples, None)
    return NewData(samples, [(part[depth],) for part in parts])


def _of_table(path: Path, multilabel: bool) -> NewData:
    table = read_table(path)
    if not {"path", "text"} & set(table.columns):
        raise DataError(f"{path}: no column 'path' or 'text'; it has {', '.join(map(str, table.columns))}")
    empty = [""] * len(table)
    paths, texts = (list(table[column]) if column in table.columns else empty for column in ("path", "text"))
    samples = [
        Sample(
            str(path.parent / file) if file.strip() else f"{path.name}#{row}",
            (),
            text=text,
            pictured=bool(file.strip()),
        )
        for row, (file, text) in enumerate(zip(paths, texts, strict=True), start=2)
    ]
    nothing = [s.path for s in samples if not s.pictured and not trimmed(s.text)]
    if nothing:
        raise DataError(f"{path}: {len(nothing)} rows have neither a path nor a text, as {nothing[0]}")
    if "label" not in table.columns or not any(label.strip() for label in table["label"]):
        return NewData(samples, None)
    rows = [label.split(";") if multilabel else [label] for label in table["label"]]
    return NewData(samples, [tuple(name.strip() for name in row if name.strip()) for row in rows])
