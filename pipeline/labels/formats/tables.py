"""CSV, TSV and Parquet files of labels: one row for each decision, with the columns of COLUMNS.

Any manifest with the columns path and label is such a file. `label` holds `a;b` for two labels.
"""

import io
from collections.abc import Sequence
from pathlib import Path

from refract.pipeline.data.sources.tables import read_table
from refract.pipeline.files import write_atomically
from refract.pipeline.labels.formats.entry import Entry, LabelFile, action_named, label_names, time_of, time_text

COLUMNS = ("path", "label", "action", "reviewer", "time", "reason", "origin", "content")


def read(path: Path) -> LabelFile:
    """Read a table. Without the column action, each row with a label is a relabel. DataError or LabelError names the line."""
    table = read_table(path)
    for column in ("path", "label"):
        if column not in table.columns:
            raise table.lacks(column, needed="path,label[,action,reviewer,time,reason,origin,content]")
    named = {name.casefold(): name for name in table.columns} | {name: name for name in table.columns}
    columns = {column: table.texts(named.get(column, column)) for column in COLUMNS}
    entries, unlabelled = [], []
    for row, name in enumerate(columns["path"]):
        where = table.where(row)
        text = {column: values[row] for column, values in columns.items()}
        labels = label_names(text["label"].split(";"))
        if not (labels or text["action"]):
            unlabelled.append(f"{where}: {name}")
            continue
        entries.append(
            Entry(
                where,
                name,
                action_named(text["action"] or "relabel", where),
                labels,
                text["reviewer"],
                time_of(text["time"], where),
                text["reason"],
                text["origin"] or "import",
                text["content"],
            )
        )
    return LabelFile(entries, unlabelled)


def write(path: Path, entries: Sequence[Entry]) -> int:
    """Write a row for each entry, as CSV, TSV or Parquet by the file's suffix. Returns the number of rows. OSError if that fails."""
    import csv

    import pandas as pd

    rows = [
        (e.name, ";".join(e.labels), e.action, e.reviewer, time_text(e.time), e.reason, e.origin, e.content)
        for e in entries
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS), dtype="string")
    if path.suffix.lower() == ".parquet":
        stream = io.BytesIO()
        table.to_parquet(stream, index=False)
        write_atomically(path, stream.getvalue())
    else:
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        # Quote all values, as `write_splits` does.
        text = table.to_csv(index=False, quoting=csv.QUOTE_ALL, sep=separator)
        write_atomically(path, text.encode("utf-8"))
    return len(rows)
