"""List the rows to score in a reproducible order: the images of a folder, or the rows of a manifest."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from refract.pipeline.data.sources import open_source
from refract.pipeline.data.sources.folders import no_images


class Row(NamedTuple):
    """A row to score. path: the path of the image as given, None for a row with only a text; truth: the manifest's label."""

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


def listing_of(source: str | Path) -> Listing:
    """List the images of a folder at any depth, or the rows of a `.csv`, `.tsv` or `.parquet` manifest.

    A manifest has the column path, text or both, and optionally label. Raises DataError for other sources and damaged manifests.
    """
    rows = open_source(source, embedded=False).rows(labelled=False)
    if rows.folder:
        # A broken link has a row too: its error. The order is that of the plain paths, as in scorings that earlier versions began.
        files = sorted([*rows.paths, *rows.skipped.unreadable_images()])
        if not files:
            raise no_images(source)
        return Listing(rows.source, str(Path.cwd()), tuple(map(Row, files)))
    absent = [None] * len(rows)
    paths, texts, truths = rows.paths, rows.texts or absent, rows.labels or absent
    listed = (Row(path if path.strip() else None, *rest) for path, *rest in zip(paths, texts, truths, strict=True))
    root = Path.cwd() if rows.root is None else rows.root.resolve()
    return Listing(rows.source, str(root), tuple(listed), texts=rows.texts is not None, truths=rows.labels is not None)
