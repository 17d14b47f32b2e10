"""Read the class hierarchy of `data.hierarchy`: a table with the columns label and parent."""

import logging
from dataclasses import replace
from pathlib import Path

from refract.models.hierarchy import Hierarchy, HierarchyError
from refract.models.tasks import SINGLE_LABEL
from refract.pipeline.config.config import ConfigError
from refract.pipeline.data.manifest import DataError, Manifest
from refract.pipeline.data.sources.folders import label_of, trimmed_name
from refract.pipeline.data.sources.tables import TABLES, Table, read_table

log = logging.getLogger(__name__)


def with_hierarchy(manifest: Manifest, file: str | None) -> Manifest:
    """Return the manifest with the class hierarchy of a table; unchanged without one.

    Raises ConfigError for multi-label data, and DataError with the line for a table that does not describe the classes.
    """
    if file is None:
        return manifest
    if manifest.task not in SINGLE_LABEL:
        raise ConfigError(
            f"data.hierarchy: {file}: the data is multi-label. Its labels are independent, so their probabilities do not add up to that of "
            "their parent; remove the key, or give each image one label (data.task: multiclass)"
        )
    return replace(manifest, hierarchy=read_hierarchy(Path(file), manifest.labels))


def read_hierarchy(path: Path, labels: tuple[str, ...]) -> Hierarchy:
    """Read the hierarchy of classes from a CSV, TSV or Parquet table with the columns label and parent; a root has no parent.

    A class without a row becomes a root, which is logged. DataError names the file and the line.
    """
    if path.suffix.lower() not in TABLES:
        raise DataError(
            f"data.hierarchy: {path} is not a table; accepted: {', '.join(TABLES)} with the columns label and parent"
        )
    table = read_table(path)
    if missing := [name for name in ("label", "parent") if name not in table.columns]:
        raise table.lacks(*missing, needed="label and parent, which is empty for a root")
    parents, rows = _parents(table)
    absent = [label for label in labels if label not in parents]
    try:
        hierarchy = Hierarchy(labels, parents | dict.fromkeys(absent))
    except HierarchyError as error:
        where = table.where(rows[error.name]) if error.name in rows else str(path)
        raise DataError(f"{where}: {error}") from error
    if absent:
        shown = ", ".join(absent[:10]) + (" …" if len(absent) > 10 else "")
        log.warning("data.hierarchy: %d classes have no row in %s and no parent: %s", len(absent), path, shown)
    return hierarchy


def _parents(table: Table) -> tuple[dict[str, str | None], dict[str, int]]:
    """Return (name → parent, None for a root; name → the row that names it). Parents without a row are roots."""
    parents: dict[str, str | None] = {}
    rows: dict[str, int] = {}
    written = [label_of(trimmed_name(parent)) for parent in table.columns["parent"]]
    for row, (label, parent) in enumerate(zip(table.columns["label"], written, strict=True)):
        if not label:
            raise DataError(f"{table.where(row)}: the label is empty; expected a class or a parent of classes")
        if label in parents and parents[label] != (parent or None):
            raise DataError(
                f"{table.where(row)}: {label!r} has {_named(parent)}, but {_named(parents[label])} in {table.where(rows[label])}; "
                "a class or parent has one place in the hierarchy; remove one of the rows"
            )
        parents[label] = parent or None
        rows.setdefault(label, row)
    for row, parent in enumerate(written):
        if parent and parent not in parents:
            parents[parent] = None
            rows[parent] = row
    return parents, rows


def _named(parent: str | None) -> str:
    return f"the parent {parent!r}" if parent else "no parent"
