"""A CSV, TSV or Parquet table as a source."""

from pathlib import Path
from typing import ClassVar

from refract.pipeline.data.sources.source import Rows, Source
from refract.pipeline.data.sources.tables import COLUMNS, TABLES, Table, is_table, read_table


class TableSource(Source):
    accepts: ClassVar[str] = f"a {', '.join(TABLES[:-1])} or {TABLES[-1]} manifest"

    @classmethod
    def recognises(cls, name: str) -> bool:
        return is_table(Path(name))

    def rows(self, *, labelled: bool) -> Rows:
        """Read the columns path (absolute, or relative to the table's folder), label, split and text; all others are metadata."""
        table = read_table(Path(self.name))
        (_require_labels if labelled else _require_samples)(table)
        columns = table.columns
        return Rows(
            str(table.path),
            table.texts("path"),
            table.folder,
            labels=columns.get("label"),
            splits=columns.get("split"),
            texts=columns.get("text"),
            metadata={name: values for name, values in columns.items() if name not in COLUMNS},
            lines=table.lines,
            notes=table.notes,
        )


def _require_labels(table: Table) -> None:
    missing = [column for column in ("path", "label") if column not in table.columns]
    if missing and not ("text" in table.columns and missing == ["path"]):
        raise table.lacks(missing[0], needed="path,label and/or text[,split]")


def _require_samples(table: Table) -> None:
    if not {"path", "text"} & {*table.columns}:
        raise table.lacks("path", "text", needed="path and/or text[,label]")
