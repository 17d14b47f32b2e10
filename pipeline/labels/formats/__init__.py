"""Files of labels that other tools read and write. A further format is a module with `read` and `write` and an entry in FORMATS."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from refract.pipeline.labels.decisions import LabelError
from refract.pipeline.labels.formats import cvat, label_studio, tables
from refract.pipeline.labels.formats.entry import Entry, LabelFile


@dataclass(frozen=True)
class Format:
    """A file format. name: for messages; read: returns the decisions of a file; write: returns the number of decisions it has written."""

    name: str
    read: Callable[[Path], LabelFile]
    write: Callable[[Path, Sequence[Entry]], int]


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        ".csv": Format("CSV", tables.read, tables.write),
        ".tsv": Format("TSV", tables.read, tables.write),
        ".parquet": Format("Parquet", tables.read, tables.write),
        ".json": Format("Label Studio JSON", label_studio.read, label_studio.write),
        ".xml": Format("CVAT for images 1.1", cvat.read, cvat.write),
    }
)
"""Suffix of a file → its format."""


def format_of(path: Path) -> Format:
    """Return the format of a file by its suffix. LabelError for an unknown suffix."""
    if path.suffix.lower() not in FORMATS:
        known = ", ".join(f"{suffix} ({one.name})" for suffix, one in FORMATS.items())
        raise LabelError(f"{path}: {path.suffix or 'no suffix'} is not a format of labels; expected {known}")
    return FORMATS[path.suffix.lower()]
