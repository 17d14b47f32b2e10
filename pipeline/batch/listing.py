"""What is to be scored, in an order that is the same each time: the pictures of a folder, or the rows of a manifest."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from augment.decode import SUFFIXES
from pipeline.data.manifest import DataError, read_table


class Row(NamedTuple):
    """path: of the picture as it was named, None for a text alone; truth: the manifest's own label."""

    path: str | None
    text: str | None = None
    truth: str | None = None


class Shard(NamedTuple):
    """Neighbouring rows, whose answers make one part file. start: the place of the first one in the listing."""

    number: int
    start: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Listing:
    """source: as the user named it; root: what the rows' paths are relative to."""

    source: str
    root: str
    rows: tuple[Row, ...]
    texts: bool = False
    truths: bool = False

    def digest(self) -> str:
        """SHA-256 over all that the rows say, in hexadecimal; the pictures themselves are not looked at."""
        found = hashlib.sha256(self.root.encode("utf-8", "surrogateescape"))
        for row in self.rows:
            found.update(json.dumps(row).encode() + b"\n")
        return found.hexdigest()

    def shards(self, size: int) -> Iterator[Shard]:
        for number, start in enumerate(range(0, len(self.rows), size)):
            yield Shard(number, start, self.rows[start : start + size])


def listing_of(source: Path) -> Listing:
    """A folder, at any depth, or a `.csv`/`.parquet` manifest with the columns path and/or text, perhaps label. DataError says what is
    wrong with it."""
    if source.is_dir():
        return _folder(source)
    if source.is_file() and source.suffix.lower() in (".csv", ".parquet"):
        return _table(source)
    if source.is_file():
        raise DataError(
            f"{source}: expected a folder of pictures, or a .csv or .parquet manifest, not a {source.suffix or 'plain'} file; "
            "`refract predict` takes single pictures"
        )
    raise DataError(f"{source}: no such folder or file, seen from {Path.cwd()}")


def _folder(root: Path) -> Listing:
    found: list[str] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (own := os.path.realpath(folder)) in seen:  # a link to a folder above it, or to one that is here already
            folders.clear()
            continue
        seen.add(own)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = (name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        found += (os.path.join(folder, name) for name in pictures)  # noqa: PTH118 — a tenth of Path's time, for millions
    if not found:
        raise DataError(f"{root}: no pictures in this folder; Refract reads {', '.join(SUFFIXES)}")
    return Listing(str(root), str(Path.cwd()), tuple(Row(path) for path in sorted(found)))


def _table(path: Path) -> Listing:
    table = read_table(path)
    if "path" not in table.columns and "text" not in table.columns:
        raise DataError(
            f"{path}: no column 'path' and no column 'text'; it has {', '.join(map(str, table.columns))}; needed: path and/or text[,label]"
        )
    nothing = [None] * len(table)
    paths, texts, truths = (table[name] if name in table.columns else nothing for name in ("path", "text", "label"))
    rows = tuple(
        Row(file if file and file.strip() else None, text, truth)
        for file, text, truth in zip(paths, texts, truths, strict=True)
    )
    return Listing(
        str(path), str(path.parent.resolve()), rows, texts="text" in table.columns, truths="label" in table.columns
    )
