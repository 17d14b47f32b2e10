"""The interface of a data source: its rows, in columns. Independent of splits that are drawn, tasks and networks."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from refract.augment.image_files import Skipped
from refract.pipeline.data.storage import scheme_of

_ODD = re.compile(r"//|/\.?$|(^|/)\./|^\.?$|\0")
"""What pathlib changes in a path, or refuses."""


@dataclass(frozen=True)
class Rows:
    """The rows of a source in a reproducible order, as columns of one length; a column that the source lacks is None.

    source: the path or name that the user gave; paths: the paths of the images, blank for a text alone; root: the folder of relative paths,
    None for the current folder; labels: `a;b` for two labels, "" for none; splits: "" for none; images: the encoded images of an embedded
    data set; metadata: further columns. lines: the line of each row in a text file. classes: class names, which may have no row. folder:
    the listed folder, whose subfolders may be classes, or "". empty, loose, skipped, notes: as in `Manifest`.
    """

    source: str
    paths: Sequence[str]
    root: Path | None = None
    labels: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    texts: Sequence[str] | None = None
    images: Sequence[bytes] | None = None
    metadata: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lines: Sequence[int] = ()
    classes: tuple[str, ...] = ()
    folder: str = ""
    empty: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()
    skipped: Skipped = field(default_factory=Skipped, hash=False)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def has_image(self, row: int) -> bool:
        return bool(self.paths[row].strip())

    def file(self, row: int) -> str:
        """Return the path of the row's image, or a name such as `m.csv#2` for a text alone."""
        if not self.has_image(row):
            return f"{Path(self.source).name}#{row + 2}"
        path = self.paths[row]
        if self.root is None or scheme_of(path):
            return path.removeprefix("./")
        if _ODD.search(path) is None:  # a hundred times as fast as pathlib, and equal
            return path if path.startswith("/") else f"{self.prefix}{path}"
        return str(self.root / path)

    @cached_property
    def prefix(self) -> str:
        """The text before a relative path: the root and a slash."""
        root = str(self.root)
        return "" if self.root is None or root == "." else f"{root.rstrip('/')}/"

    def where(self, row: int) -> str:
        """Return the location of a row, counted from 0, for an error: `m.csv, line 3`."""
        return f"{self.source}, line {self.lines[row]}" if self.lines else f"{self.source}, row {row + 1}"


@dataclass(frozen=True)
class Source(ABC):
    """A data set that a user names. name: as the user gave it."""

    name: str
    accepts: ClassVar[str]
    """What a name of this kind is, for error messages; "" for a special form of another kind."""
    embedded: ClassVar[bool] = False
    """Whether the images are in the package, not in files."""

    @classmethod
    @abstractmethod
    def recognises(cls, name: str) -> bool:
        """Return whether the name is that of a source of this kind."""

    @abstractmethod
    def rows(self, *, labelled: bool) -> Rows:
        """Read the rows.

        labelled: apply the rules of training: folders are CLASS/… or SPLIT/CLASS/…, and a table has the column label. Else labels are
        optional, and a folder gives every image at any depth, without a label. DataError names what cannot be read.
        """

    def check_task(self, task: str) -> None:  # noqa: B027 — most kinds accept each task
        """Raise DataError if the labels of this kind of source do not fit `data.task`."""
