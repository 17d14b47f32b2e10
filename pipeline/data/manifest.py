"""What a data set is: samples with labels and splits, from a folder, a CSV or Parquet manifest, or the embedded digits."""

import csv
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from augment.decode import SUFFIXES
from models.texts.tokens import trimmed
from pipeline.files import read_file

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "val", "test")
COLUMNS = ("path", "label", "split", "text")
"""Of a manifest; further ones are metadata."""


class DataError(ValueError):
    """The data cannot be used; the message lists what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Sample:
    """One picture, with its text or without, or a text alone. path: the picture's file, or a name where `data` holds the encoded bytes;
    labels: indices; split: "" where not given; pictured: false for a text alone, whose picture is a plain grey one; metadata: further
    columns of its manifest, column → value."""

    path: str
    labels: tuple[int, ...]
    split: str = ""
    text: str = ""
    data: bytes | None = field(default=None, repr=False)
    pictured: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """What tells it from others: a picture may be there several times with other texts."""
        return f"{self.path}\0{self.text}" if self.text else self.path

    def read(self) -> bytes:
        """The encoded picture. OSError where the file cannot be read."""
        return read_file(self.path) if self.data is None else self.data


@dataclass(frozen=True)
class Manifest:
    """A data set. source: as the user named it; labels: names, sorted; task: binary, multiclass or multilabel."""

    source: str
    samples: tuple[Sample, ...]
    labels: tuple[str, ...]
    task: str
    empty: tuple[str, ...] = ()
    """Class folders without a picture."""
    ignored: tuple[str, ...] = ()
    """Files beside the pictures that are none by their suffix."""
    loose: tuple[str, ...] = ()
    """Pictures beside the class folders, which are of no class."""
    near: tuple[tuple[str, str], ...] = ()
    """Pictures of the hold-out and those of the training that they resemble: see `pipeline.data.near`."""
    drawn: tuple[str, ...] = ()
    """Splits that the data does not have, and that were drawn from the seed."""

    def of(self, split: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.split == split]

    def splits(self) -> list[str]:
        """The splits that hold samples, in the order train, val, test."""
        present = {sample.split for sample in self.samples}
        return [split for split in SPLITS if split in present]

    def counts(self, split: str | None = None) -> dict[str, int]:
        """Label → how many samples carry it."""
        counter = Counter(i for s in self.samples if split is None or s.split == split for i in s.labels)
        return {label: counter[i] for i, label in enumerate(self.labels)}

    def near_of(self, samples: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
        """Those of the samples, by path, that are in `near`, each with what it resembles."""
        by_path, wanted = {sample.path: sample for sample in self.samples}, {sample.path for sample in samples}
        return [(by_path[path], by_path[other]) for path, other in self.near if path in wanted]

    def with_samples(self, samples: Sequence[Sample]) -> "Manifest":
        return replace(self, samples=tuple(samples))


def load_manifest(source: str | Path, task: str = "auto", *, to_train: bool = True) -> Manifest:
    """Read a data set. source: `digits`, a folder, or a `.csv`/`.parquet` file. DataError says what is wrong with it; `to_train`, also that
    it has splits and nothing to train on, or one class alone."""
    manifest = _load(source, task)
    if to_train:
        _refuse_untrainable(manifest)
    return manifest


def _load(source: str | Path, task: str) -> Manifest:
    path = Path(source)
    if str(source) == "digits" and not path.exists():
        if task not in ("auto", "multiclass"):
            raise DataError(f"data.task: {task}, but the digits have ten classes and one of them a picture")
        return _digits()
    if path.is_dir():
        return _from_folder(path, task)
    if path.is_file() and path.suffix.lower() in (".csv", ".parquet"):
        return _from_table(path, task)
    if path.is_file():
        raise DataError(
            f"{path}: expected a folder, a .csv or .parquet manifest, or `digits`, not a {path.suffix or 'plain'} file"
        )
    raise DataError(f"{path}: no such folder or file, seen from {Path.cwd()}")


def _digits() -> Manifest:
    """scikit-learn's 1,797 handwritten digits (UCI), 8×8 pixels of 17 grey levels, as PNG."""
    import cv2
    from sklearn.datasets import load_digits

    images, numbers = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    samples = tuple(
        Sample(f"digits/{i:04}.png", (int(number),), data=cv2.imencode(".png", image)[1].tobytes())
        for i, (image, number) in enumerate(zip(pixels, numbers, strict=True))
    )
    return Manifest("digits", samples, tuple("0123456789"), "multiclass")


def _from_folder(root: Path, task: str) -> Manifest:
    if task == "multilabel":
        raise DataError(
            f"{root}: a folder gives each picture one class; use a manifest with labels such as `cat;dog` for multilabel"
        )
    folders = _folders(root)
    split_folders = [folder for folder in folders if folder.name in SPLITS]
    if split_folders and len(split_folders) < len(folders):
        others = [folder.name for folder in folders if folder.name not in SPLITS]
        raise DataError(
            f"{root}: holds split folders ({', '.join(f.name for f in split_folders)}) and others ({', '.join(others[:5])}); "
            "keep either CLASS/… or train|val|test/CLASS/…"
            + "".join(f"; rename {name} to val" for name in others if name.lower() in ("valid", "validation", "dev"))
        )
    classes = [(f.name, c) for f in split_folders for c in _folders(f)] if split_folders else [("", f) for f in folders]
    if not classes:
        raise DataError(
            f"{root}: no class folders. Put the pictures of each class into a folder named after it ({root}/CLASS/*.jpg), or write a "
            "manifest (CSV with the columns path,label)."
        )
    labels = tuple(sorted({folder.name for _, folder in classes}))
    odd = [label for label in labels if ";" in label or label != label.strip()]
    if odd:
        raise DataError(
            f"{root}: the class folder {odd[0]!r} cannot be a label: `;` separates labels in manifests, and blanks at the ends are lost "
            "there; rename it"
        )
    index = {label: i for i, label in enumerate(labels)}
    samples, empty, ignored = [], [], []
    loose = [str(path) for place in (root, *split_folders) for path in _files(place.iterdir()) if _is_picture(path)]
    for split, folder in classes:
        files = _files(folder.rglob("*"))
        pictures = [path for path in files if _is_picture(path)]
        ignored += [str(path) for path in files if not _is_picture(path)]
        samples += [Sample(str(path), (index[folder.name],), split) for path in pictures]
        if not pictures:
            empty.append(str(folder))
    manifest = _manifest(str(root), samples, labels, task)
    return replace(manifest, empty=tuple(empty), ignored=tuple(ignored), loose=tuple(loose))


def read_table(path: Path) -> "pd.DataFrame":
    """A CSV or Parquet file, all of its columns as text. DataError."""
    import pandas as pd

    try:
        if path.suffix.lower() == ".csv":
            _refuse_other_separators(path)
            with warnings.catch_warnings():  # rows longer than the header: pandas would take or drop what is too much
                warnings.simplefilter("error", pd.errors.ParserWarning)
                table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
        else:
            table = _texts(pd.read_parquet(path))
    except DataError:
        raise
    except Exception as error:  # pandas and pyarrow raise many kinds for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        rows = isinstance(error, pd.errors.ParserError | pd.errors.ParserWarning)
        if rows and (number := _longer_than_header(path)):
            raise DataError(
                f"{path}: line {number} has more fields than the header; take a comma from the end, or put what has one in it into quotes"
            ) from error
        raise DataError(f"{path}: cannot be read as a {path.suffix[1:].upper()} table ({reason})") from error
    if table.empty:
        raise DataError(f"{path}: the manifest has no rows")
    return table


def _refuse_other_separators(path: Path) -> None:
    """DataError where the first line has no comma between columns, but what else separates them. What is no text is the table reader's to
    tell."""
    with path.open("rb") as file:
        first = next((line for line in iter(lambda: file.readline(1 << 16), b"") if line.strip()), b"")
    try:
        header = first.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError:
        return
    unquoted = re.sub(r'"[^"]*("|$)', "", header)
    mark = next((mark for mark in ";\t|" if mark in unquoted), "")
    if mark and "," not in unquoted and header.replace("\t", "").isprintable():
        raise DataError(f"{path}: the columns of {header[:80]!r} are separated by {mark!r}; separate them by commas")


def _longer_than_header(path: Path) -> int:
    """The first line that ends a row of more fields than the header has, counted from 1; 0 where none is found."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            width = len(next((row for row in rows if row), []))
            return next((rows.line_num for row in rows if len(row) > width), 0)
    except (csv.Error, UnicodeDecodeError):  # of a field that the module finds too long
        return 0


def _from_table(path: Path, task: str) -> Manifest:
    """Columns: path (relative to the manifest's folder, or absolute), label (several as `a;b`), perhaps split and text, and any others as
    metadata."""
    import pandas as pd

    table = read_table(path)
    if "path" not in table.columns and "text" in table.columns:
        table["path"] = ""
    missing = [column for column in ("path", "label") if column not in table.columns]
    if missing:
        raise DataError(
            f"{path}: no column {missing[0]!r}; it has {', '.join(map(str, table.columns))}; needed: path,label and/or text[,split]"
        )
    splits = table["split"].str.strip() if "split" in table.columns else pd.Series("", index=table.index)
    _refuse_rows(path, ~splits.isin([*SPLITS, ""]), splits, "split", f"one of {', '.join(SPLITS)}, or empty")
    if (splits == "").any() and (splits != "").any():
        _refuse_rows(path, splits == "", splits, "split", "filled, as in other rows")
    texts = table["text"] if "text" in table.columns else pd.Series("", index=table.index)
    _refuse_rows(
        path,
        (table["path"].str.strip() == "") & (texts.map(trimmed) == ""),
        table["path"],
        "path",
        "a file, nor is there a text",
    )
    names = [
        tuple(dict.fromkeys(part.strip() for part in label.split(";") if part.strip())) for label in table["label"]
    ]
    several = task == "multilabel" or (task == "auto" and any(";" in label for label in table["label"]))
    if not several:
        names = [(label.strip(),) if label.strip() else () for label in table["label"]]
        _refuse_rows(
            path, pd.Series([not n for n in names], index=table.index), table["label"], "label", "a class name"
        )
    labels = tuple(sorted({name for row in names for name in row}))
    index = {label: i for i, label in enumerate(labels)}
    columns = [column for column in table.columns if column not in COLUMNS]
    further = [dict(zip(map(str, columns), row, strict=True)) for row in table[columns].itertuples(index=False)]
    samples = [
        Sample(
            str(path.parent / file) if file.strip() else f"{path.name}#{number}", tuple(index[name] for name in row), split, text,
            None if file.strip() else _blank(), bool(file.strip()), metadata=more,
        )
        for number, (file, row, split, text, more) in enumerate(zip(table["path"], names, splits, texts, further, strict=True), start=2)
    ]  # fmt: skip
    return _manifest(str(path), samples, labels, "multilabel" if several else task)


def _texts(table: "pd.DataFrame") -> "pd.DataFrame":
    """All columns as text, an empty one for what is missing; columns that hold bytes, as hashes and thumbnails, are left out. ValueError
    for lists in a column that is read."""
    for column in table.columns.intersection(list(COLUMNS)):
        several = table[column].map(lambda value: isinstance(value, np.ndarray | list | tuple | dict)).to_numpy()
        if several.any():
            raise ValueError(
                f"column {column!r}, row {int(several.argmax()) + 2}: expected one text, found several values"
            )
    bytes_in = [c for c in table.columns if c not in COLUMNS and any(isinstance(value, bytes) for value in table[c])]
    return table.drop(columns=bytes_in).astype("string").fillna("")


def _manifest(source: str, samples: list[Sample], labels: tuple[str, ...], task: str) -> Manifest:
    if not samples:
        raise DataError(f"{source}: no pictures; Refract reads {', '.join(SUFFIXES)}")
    unnamable = [sample.path for sample in samples if not _is_text(sample.path)]
    if unnamable:
        raise DataError(
            f"{source}: {len(unnamable)} file names are not UTF-8, as {os.fsencode(unnamable[0])!r}, so that no manifest or report could "
            "name them; rename them (`convmv -r -f latin1 -t utf8 --notest FOLDER` does, if they are Latin-1)"
        )
    if task == "auto":
        task = "binary" if len(labels) == 2 else "multiclass"
    if task == "binary" and len(labels) != 2:
        raise DataError(f"{source}: data.task is binary, but there are {len(labels)} classes: {', '.join(labels[:10])}")
    return Manifest(source, tuple(samples), labels, task)


def _refuse_untrainable(manifest: Manifest) -> None:
    splits = manifest.splits()
    if splits and "train" not in splits:
        raise DataError(
            f"{manifest.source}: has pictures of the split {', '.join(splits)}, and none of the split train"
        )
    if len(manifest.labels) < 2 and manifest.task != "multilabel":
        raise DataError(
            f"{manifest.source}: only one class ({', '.join(manifest.labels)}); a classifier needs two or more"
        )


@cache
def _blank() -> bytes:
    """What stands for the picture of a text alone wherever one is shown or decoded."""
    import cv2

    return cv2.imencode(".png", np.full((32, 32, 3), 128, np.uint8))[1].tobytes()


def _refuse_rows(path: Path, wrong, values, column: str, accepted: str) -> None:
    if wrong.any():
        first = int(wrong.to_numpy().argmax())
        raise DataError(
            f"{path}, row {first + 2}: {column} {values.iloc[first]!r} is not {accepted} ({int(wrong.sum())} such rows; header: row 1)"
        )


def _is_text(path: str) -> bool:
    """Whether a name from the file system is text: Python gives a byte that is none as half of a surrogate pair."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _files(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_file() and not path.name.startswith("."))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
