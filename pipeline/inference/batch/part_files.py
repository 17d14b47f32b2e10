"""The folder in which part files gather beside the file that they will be, so that a scoring that ended in between goes on.

`.NAME.parts/` has `record.json`, what the parts depend on, and `NNNNNNN-KEY.parquet`, whole or not there: KEY is the record's digest, so
what a process of an earlier scoring leaves late is none of this one's.
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

TOLD = {
    "bundle": "another bundle",
    "listing": "other rows",
    "shard_size": "another --shard-size",
    "tta": "another --tta",
}
TOGETHER = 64 << 20
"""Bytes of rows in a row group of the final file, about."""

REPEATED = ["label", "labels.list.element", "error", "truth"]
"""Columns whose values come again and again. A dictionary of all the probabilities, which is Parquet's default, takes longer and more."""


def folder_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.parts")


def part_of(folder: Path, key: str, number: int) -> Path:
    return folder / f"{number:07}-{key}.parquet"


def key_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def read_record(folder: Path) -> dict[str, Any] | None:
    """None where there is none, or a damaged one."""
    try:
        record = json.loads((folder / "record.json").read_bytes())
        return record if isinstance(record, dict) else None
    except (OSError, ValueError):
        return None


def begin(folder: Path, record: dict[str, Any], *, restart: bool) -> None:
    """Make the folder one of this record. DataError where it holds parts of another one, which `restart` throws away."""
    held = sorted(folder.glob("*.parquet"))
    before = read_record(folder)
    if before == record and not restart:
        return
    if held and not restart:
        what = [told for name, told in TOLD.items() if (before or {}).get(name) != record[name]]
        raise DataError(
            f"{folder} holds {len(held)} parts of a scoring of {' and '.join(what) if before and what else 'something else'}. Give what "
            "was given then, and it goes on; or add --restart, which throws them away; or write to another file by -o"
        )
    clear(folder)
    write_atomically(folder / "record.json", json.dumps(record, indent=1).encode())


def clear(folder: Path) -> None:
    """Throw the parts away."""
    for file in [*folder.glob("*.parquet"), folder / "record.json"]:
        file.unlink(missing_ok=True)


def write_part(folder: Path, key: str, number: int, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, use_dictionary=REPEATED)
    write_atomically(part_of(folder, key, number), buffer.getvalue())


def is_whole(file: Path, rows: int) -> bool:
    """Whether the part is there with so many rows. One that the disk damaged is taken away, to be made again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.exists():
        return False
    try:
        if pq.read_metadata(file).num_rows == rows:
            return True
    except (pa.ArrowException, OSError, ValueError):  # ValueError: names that are no text
        pass
    file.unlink(missing_ok=True)
    return False


def assemble(
    folder: Path, files: Iterable[Path], out: Path, schema: pa.Schema, *, rows: int, look: Callable[[pa.Table], None]
) -> None:
    """Make `out` of the parts, whole or not at all, after counting that each row is there once. look: is shown all of them in turn.

    DataError names a part that cannot be read or has other rows; it is taken away, so that the next scoring makes it again.
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
                look(table)
                seen += len(table)
                gathered.append(table)
                if sum(part.nbytes for part in gathered) > TOGETHER:
                    writer.write_table(pa.concat_tables(gathered))
                    gathered = []
            if gathered:
                writer.write_table(pa.concat_tables(gathered))
        if seen != rows:
            raise RuntimeError(f"{out}: {seen} rows came of {rows}")
    whole.replace(out)


def _part(file: Path, schema: pa.Schema, start: int) -> pa.Table:
    """A part whose rows follow those before it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # `read_table` would import pyarrow.dataset first, which takes longer than most files.
        with pq.ParquetFile(file) as opened:
            table = opened.read()
        if table.schema.equals(schema) and table["row"].to_pylist() == list(range(start, start + len(table))):
            return table.replace_schema_metadata(schema.metadata)
        reason = "has other rows or columns than it should"
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = f"cannot be read ({(str(error).splitlines() or ['damaged'])[0]})"
    file.unlink(missing_ok=True)
    raise DataError(f"{file}: this part {reason} and was taken away; the same command again makes it anew")


def key_in(file: Path) -> str | None:
    """The key that a finished file carries; None where it is none of ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return (pq.read_schema(file).metadata or {}).get(KEY, b"").decode() or None
    except (pa.ArrowException, OSError, ValueError):
        return None


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
