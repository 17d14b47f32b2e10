"""The folder of part files next to the output file, from which an interrupted scoring resumes.

`.NAME.parts/` holds `record.json`, all that the parts depend on, and the parts `NNNNNNN-KEY.parquet`, which are written atomically. KEY is
the record's digest, so a late part of an earlier scoring is not mistaken for a current one.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.pipeline.data.manifest import DataError
from refract.pipeline.files import write_atomically, written_atomically
from refract.pipeline.inference.batch.rows import KEY

if TYPE_CHECKING:
    import pyarrow as pa

DIFFERENCES = {
    "bundle": "another bundle",
    "listing": "other rows",
    "shard_size": "another --shard-size",
    "tta": "another --tta",
    "embeddings": "another --embeddings",
}
ROW_GROUP_BYTES = 64 << 20
"""Approximate bytes of rows in a row group of the final file."""

REPEATED = ["label", "labels.list.element", "error", "truth"]
"""Columns with repeated values, which get a dictionary. For the probabilities, a dictionary (Parquet's default) costs time and space."""


def folder_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


def part_of(folder: Path, key: str, number: int) -> Path:
    return folder / f"{number:07}-{key}.parquet"


def key_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record, or None if it is missing or damaged."""
    try:
        record = json.loads((folder / "record.json").read_bytes())
        return record if isinstance(record, dict) else None
    except (OSError, ValueError):
        return None


def begin(folder: Path, record: dict[str, Any], *, restart: bool) -> None:
    """Prepare the folder for this record.

    Raises DataError if the folder holds parts of another record, unless `restart` discards them.
    """
    parts = sorted(folder.glob("*.parquet"))
    stored = read_record(folder)
    if stored == record and not restart:
        return
    if parts and not restart:
        changed = [text for name, text in DIFFERENCES.items() if (stored or {}).get(name) != record.get(name)]
        cause = " and ".join(changed) if stored and changed else "unknown options"
        raise DataError(
            f"{folder} holds {len(parts)} parts of a scoring with {cause}. To resume it, repeat its arguments; to discard the parts, add "
            "--restart; or write to another file with -o"
        )
    clear(folder)
    write_atomically(folder / "record.json", json.dumps(record, indent=1).encode())


def clear(folder: Path) -> None:
    """Delete the parts and the record."""
    for file in [*folder.glob("*.parquet"), folder / "record.json"]:
        file.unlink(missing_ok=True)


def write_part(folder: Path, key: str, number: int, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, use_dictionary=REPEATED)
    write_atomically(part_of(folder, key, number), buffer.getvalue())


def is_whole(file: Path, rows: int) -> bool:
    """Whether the part exists with this number of rows. A damaged part is deleted, so that it is scored again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.exists():
        return False
    try:
        if pq.read_metadata(file).num_rows == rows:
            return True
    except (pa.ArrowException, OSError, ValueError):  # ValueError: column names that are not UTF-8
        pass
    file.unlink(missing_ok=True)
    return False


def assemble(
    folder: Path, files: Iterable[Path], out: Path, schema: pa.Schema, *, rows: int, visit: Callable[[pa.Table], None]
) -> None:
    """Combine the parts into `out` atomically, and check that each row occurs once. visit: called with each part in order.

    Raises DataError for a part that is unreadable or has other rows. That part is deleted, so that the next scoring writes it again.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = folder / "whole"
    with written_atomically(whole) as target:
        with pq.ParquetWriter(target, schema, use_dictionary=REPEATED) as writer:
            gathered: list[pa.Table] = []
            seen = 0
            for file in files:
                table = _part(file, schema, seen)
                visit(table)
                seen += len(table)
                gathered.append(table)
                if sum(part.nbytes for part in gathered) > ROW_GROUP_BYTES:
                    writer.write_table(pa.concat_tables(gathered))
                    gathered = []
            if gathered:
                writer.write_table(pa.concat_tables(gathered))
        if seen != rows:
            raise RuntimeError(f"{out}: the parts have {seen} rows, expected {rows}; score again with --restart")
    whole.replace(out)


def _part(file: Path, schema: pa.Schema, start: int) -> pa.Table:
    """Read a part and check that its first row has the index `start`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # `read_table` would import pyarrow.dataset first, which takes longer than most files.
        with pq.ParquetFile(file) as opened:
            table = opened.read()
        if table.schema.equals(schema) and table["row"].to_pylist() == list(range(start, start + len(table))):
            return table.replace_schema_metadata(schema.metadata)
        reason = "has unexpected rows or columns"
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = f"cannot be read ({(str(error).splitlines() or ['damaged'])[0]})"
    file.unlink(missing_ok=True)
    raise DataError(f"{file}: this part {reason} and was deleted; run the same command again to score it anew")


def key_in(file: Path) -> str | None:
    """Return the key of a finished file, or None for a file that Refract did not write."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return (pq.read_schema(file).metadata or {}).get(KEY, b"").decode() or None
    except (pa.ArrowException, OSError, ValueError):
        return None


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
