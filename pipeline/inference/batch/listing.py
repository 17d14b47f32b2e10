"""List the rows to score in a reproducible order: the images of a folder, or the rows of a manifest."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from refract.augment.decoding.decode import SUFFIXES
from refract.augment.image_files import image_files
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources.folders import unreadable
from refract.pipeline.data.sources.tables import is_table, read_table


class Row(NamedTuple):
    """A row to score. path: of the image as given, None for a row with only a text; truth: the manifest's label."""

    path: str | None
    text: str | None = None
    truth: str | None = None


class Shard(NamedTuple):
    """Consecutive rows, whose predictions form one part file. start: index of the first row in the listing."""

    number: int
    start: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Listing:
    """All rows to score. source: as the user named it; root: folder to which the rows' paths are relative; texts, truths: whether the
    rows have texts and true labels."""

    source: str
    root: str
    rows: tuple[Row, ...]
    texts: bool = False
    truths: bool = False

    def digest(self) -> str:
        """Return the SHA-256 of the root and the rows, in hexadecimal. The content of the images is not included."""
        digest = hashlib.sha256(self.root.encode("utf-8", "surrogateescape"))
        for row in self.rows:
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def shards(self, size: int) -> Iterator[Shard]:
        for number, start in enumerate(range(0, len(self.rows), size)):
            yield Shard(number, start, self.rows[start : start + size])


def listing_of(source: Path) -> Listing:
    """List the images of a folder at any depth, or the rows of a `.csv`, `.tsv` or `.parquet` manifest.

    A manifest has the column path, text or both, and optionally label. Raises DataError for other sources and damaged manifests.
    """
    if source.is_dir():
        return _folder(source)
    if is_table(source):
        return _table(source)
    if source.is_file():
        raise DataError(
            f"{source}: expected a folder of images, or a .csv, .tsv or .parquet manifest, not a {source.suffix or 'plain'} file; "
            "`refract predict` takes single images"
        )
    raise DataError(f"{source}: no such folder or file (current folder: {Path.cwd()})")


def _folder(root: Path) -> Listing:
    try:
        files = image_files(root)
    except OSError as error:
        raise unreadable(error, root) from error
    if not files:
        raise DataError(f"{root}: no images in this folder; Refract reads {', '.join(SUFFIXES)}")
    return Listing(str(root), str(Path.cwd()), tuple(Row(path) for path in sorted(files)))


def _table(path: Path) -> Listing:
    table = read_table(path)
    if not {"path", "text"} & {*table.columns}:
        raise table.lacks("path", "text", needed="path and/or text[,label]")
    absent = [None] * len(table)
    paths, texts, truths = (table.columns.get(name, absent) for name in ("path", "text", "label"))
    rows = tuple(
        Row(file if file and file.strip() else None, text, truth)
        for file, text, truth in zip(paths, texts, truths, strict=True)
    )
    return Listing(
        str(path), str(path.parent.resolve()), rows, texts="text" in table.columns, truths="label" in table.columns
    )
