"""Read a CSV, TSV or Parquet table: its columns as text under Refract's names, and the line of each row."""

import csv
import io
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from refract.models.credentials import masked
from refract.pipeline.data.archives.archive import archive_path
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources.folders import label_of, split_of, trimmed_name
from refract.pipeline.data.storage import STORAGES, scheme_of
from refract.remote.address import AddressError, checked, is_remote

if TYPE_CHECKING:
    import pandas as pd

TABLES = (".csv", ".tsv", ".parquet")
"""Suffixes of the files that `read_table` reads."""

COLUMNS = ("path", "label", "split", "text")
"""The columns that Refract reads; all others are metadata."""

SYNONYMS: Mapping[str, frozenset[str]] = {
    "path": frozenset({
        "file", "files", "filename", "file_name", "filepath", "file_path", "image", "images", "image_path", "image_file", "image_name",
        "img", "img_path", "paths",
    }),
    "label": frozenset({"labels", "class", "classes", "class_name", "category", "categories", "target", "tag", "tags"}),
    "split": frozenset({"splits", "subset", "partition"}),
}  # fmt: skip
"""Column names of other tools. A synonym is used if it is the only candidate; for path, its first file must also exist."""

_SEPARATORS = ",;\t|"


@dataclass(frozen=True)
class Table:
    """The content of a table.

    columns: name → text of each row, "" if missing; lines: line of each row in a text file, empty for Parquet; list_columns: columns that
    contain lists; notes: columns that were read under another name; name: as the user gave it, if it is a URL or a pattern.
    """

    path: Path
    columns: Mapping[str, list[str]]
    lines: Sequence[int] = ()
    list_columns: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    name: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    @property
    def title(self) -> str:
        """The name of the table in errors: a path would lose a slash of a URL."""
        return self.name or str(self.path)

    @cached_property
    def folder(self) -> Path:
        """The folder of relative paths."""
        return self.path.parent

    def texts(self, column: str) -> list[str]:
        """Return the values of a column; all "" if the column is missing."""
        return self.columns[column] if column in self.columns else [""] * len(self)

    def where(self, row: int) -> str:
        """Return the location of a row, counted from 0, for an error: `m.csv, line 3`."""
        return f"{self.title}, line {self.lines[row]}" if self.lines else f"{self.title}, row {row + 1}"

    def file(self, row_path: str) -> str:
        """Return the file path of a value of the column path."""
        return str(self.folder / row_path)

    def lacks(self, *columns: str, needed: str) -> DataError:
        """Return the error for a table without the columns. needed: the required columns, in words."""
        has = ", ".join(name if name.isidentifier() else repr(name) for name in self.columns)
        like = [f"{name!r} to {column}" for column in columns for name in self.columns if _is_synonym(name, column)]
        return DataError(
            f"{self.title}: no column {' or '.join(map(repr, columns))}; columns: {has}; needed: {needed}"
            + (
                f"; rename {' or '.join(like)}, if it has this meaning"
                if like
                else "; the first line names the columns"
            )
        )


def is_table(path: Path) -> bool:
    """Return whether the path is a file with a suffix that `read_table` reads."""
    return path.suffix.lower() in TABLES and path.is_file()


def read_table(path: Path) -> Table:
    """Read a table. Paths, labels and splits are trimmed and normalised; texts and metadata are unchanged.

    DataError names the line and the column of an ambiguous or invalid value.
    """
    return normalised(_parquet(path) if path.suffix.lower() == ".parquet" else _text_table(path))


def normalised(table: Table) -> Table:
    """Return the table with Refract's column names, and trimmed paths, labels and splits. DataError as `read_table`."""
    if not len(table):
        raise DataError(f"{table.title}: the manifest has no rows")
    return _normalised(_renamed(table))


def _parquet(path: Path) -> Table:
    import pandas as pd

    try:
        table, list_columns = texts_of(pd.read_parquet(path))
    except Exception as error:  # pyarrow raises many types for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read as a PARQUET table ({reason})") from error
    return Table(path, {str(name): list(table[name]) for name in table.columns}, list_columns=list_columns)


def texts_of(table: "pd.DataFrame") -> tuple["pd.DataFrame", frozenset[str]]:
    """Return (all columns as text, with "" for missing values; the names of columns with lists).

    Columns with bytes, such as hashes and thumbnails, are skipped. ValueError for a list in one of COLUMNS.
    """
    import numpy as np
    import pandas as pd

    read = [column for column in table.columns if _folded(str(column)) in COLUMNS]
    list_columns = set()
    for column in (name for name in table.columns if pd.api.types.is_object_dtype(table[name])):
        lists = table[column].map(lambda value: isinstance(value, np.ndarray | list | tuple | dict)).to_numpy()
        if lists.any() and column in read:
            raise ValueError(f"column {column!r}, row {int(lists.argmax()) + 1}: got a list; expected one text")
        if lists.any():
            list_columns.add(str(column))
    bytes_in = [c for c in table.columns if c not in read and any(isinstance(value, bytes) for value in table[c])]
    return table.drop(columns=bytes_in).astype("string").fillna(""), frozenset(list_columns)


def _text_table(path: Path) -> Table:
    csv.field_size_limit(sys.maxsize)  # a text may be long
    text = _decoded(path).rstrip("\x1a")  # end-of-file character of DOS
    first = trimmed_name(text[:1000]).partition("\n")[0].strip("\r")
    declared = re.fullmatch(r'"?sep=([^\w\s]|\t)"?', first, re.IGNORECASE)  # a first line for Excel
    separator = declared[1] if declared else _separator(path, text)
    rows = _rows(path, text, separator, skipped=1 if declared else 0)
    header = next(rows, None)
    if header is None:
        raise DataError(
            f"{path}: cannot be read as a CSV table (the file is empty); the first line must name the columns"
        )
    names, lines, values = header[1], list[int](), list[list[str]]()
    duplicates = [
        name for name, count in Counter(map(trimmed_name, names)).items() if count > 1 and name.casefold() in COLUMNS
    ]
    if duplicates:
        raise DataError(f"{path}, line {header[0]}: the column {duplicates[0]!r} occurs twice; rename or remove one")
    for line, row in rows:
        if not any(map(trimmed_name, row)):  # empty rows of spreadsheets
            continue
        if len(row) != len(names):
            _fit(path, line, row, names)
        if row == names:
            raise DataError(f"{path}, line {line}: repeats the header, as in concatenated files; remove the line")
        lines.append(line)
        values.append(row)
    columns = zip(*values, strict=True) if values else [()] * len(names)
    return Table(path, dict(zip(_distinct(names), map(list, columns), strict=True)), lines)


def _fit(path: Path, line: int, row: list[str], names: list[str]) -> None:
    """Pad a short row if only text and metadata are missing. DataError for other lengths."""
    if not any(map(_is_known, names)):
        raise DataError(
            f"{path}: the first line has no column that Refract reads; columns: {', '.join(map(repr, names))[:200]}"
        )
    if len(row) > len(names):
        raise DataError(
            f"{path}, line {line}: has more fields than the header; remove a trailing comma, or quote a value that contains a comma"
        )
    if "\0" in row[-1]:
        raise DataError(
            f"{path}, line {line}: contains zero bytes, probably because the file is incomplete; write it again"
        )
    missing = [trimmed_name(name) for name in names[len(row) :]]
    if missing_keys := [name for name in missing if name.casefold() in COLUMNS[:3]]:
        raise DataError(
            f"{path}, line {line}: has {len(row)} of {len(names)} fields; column {missing_keys[0]!r} is missing"
        )
    row += [""] * len(missing)


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the trimmed column names; unnamed and repeated columns are numbered."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in (trimmed_name(name) or f"Unnamed: {index}" for index, name in enumerate(names)):
        distinct.append(f"{name}.{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return distinct


def _rows(path: Path, text: str, separator: str, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line of a row, its fields), without blank lines. DataError for unbalanced quotes."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    before = 0
    try:
        for number, row in enumerate(reader):
            line, before = before + 1, reader.line_num
            if number >= skipped and (len(row) > 1 or (row and trimmed_name(row[0]))):
                yield line, row
    except csv.Error as error:
        if "unexpected end" in str(error):
            problem = "a quote is opened and never closed; close it, or double it if it belongs to the value"
            raise DataError(f"{path}, line {before + 1}: {problem}") from error
        raise DataError(
            f"{path}, line {before + 1}: {error}; quote the value, and double the quotes inside it"
        ) from error


def _separator(path: Path, text: str) -> str:
    """Return the separator that gives the header the most known columns. DataError if two separators give equally many."""
    counts = {}
    for mark in _SEPARATORS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True)
        names = next((row for row in reader if any(trimmed_name(value) for value in row)), [])
        if len(names) > 1:
            counts[mark] = sum(_is_known(name) for name in names), len(names)
    best = max(counts, key=lambda mark: counts[mark], default=",")
    equal = [mark for mark, (count, _) in counts.items() if count and count == counts[best][0]]
    if len(equal) > 1:
        raise DataError(
            f"{path}: the header separates columns by {' and by '.join(map(repr, equal))}; use commas, and quote names that contain one"
        )
    return best


_MAGIC = {
    b"PK\x03\x04": "a ZIP archive, as .xlsx files are", b"\xd0\xcf\x11\xe0": "an .xls file", b"\x1f\x8b": "compressed by gzip",
    b"PAR1": "a Parquet file", b"SQLite": "a database",
}  # fmt: skip
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def _decoded(path: Path) -> str:
    """Return the file's text: UTF-8, or UTF-16 and UTF-32 by byte order mark or zero bytes. DataError for other encodings."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a CSV table ({error.strerror})") from error
    for magic, kind in _MAGIC.items():
        if data.startswith(magic):
            raise DataError(f"{path}: cannot be read as a CSV table (it is {kind}); export the table as CSV in UTF-8")
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), _unmarked(data))
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise DataError(f"{path}: is not valid {encoding.upper()} ({error.reason}); save it as UTF-8") from error
        raise _not_utf8(path, data, error) from error


def _unmarked(data: bytes) -> str:
    """Return UTF-16 if every second of the first bytes is zero, else UTF-8."""
    first = data[:16]
    for start, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(first) > 3 and not any(first[start::2]) and all(first[1 - start :: 2]):
            return encoding
    return "utf-8-sig"


def _not_utf8(path: Path, data: bytes, error: UnicodeDecodeError) -> DataError:
    """Return an error that names the line and column of the first byte that is not UTF-8."""
    before = io.StringIO(data[: error.start].decode("utf-8-sig", "replace") + "?", newline="")
    reader = csv.reader(before, delimiter=_separator(path, data.decode("latin-1")), skipinitialspace=True)
    rows = [row for row in reader if row]
    index = len(rows[-1]) - 1
    column = f", column {trimmed_name(rows[0][index])!r}" if len(rows) > 1 and index < len(rows[0]) else ""
    return DataError(
        f"{path}, line {reader.line_num}{column}: cannot be read as a CSV table (byte 0x{data[error.start]:02X} is not UTF-8). Save it as "
        f"UTF-8; for a file from Windows: `iconv -f CP1252 -t UTF-8 {path.name} > utf8.csv`"
    )


def _folded(name: str) -> str:
    return trimmed_name(name).casefold()


def _is_synonym(name: str, column: str) -> bool:
    return re.sub("[ -]", "_", _folded(name)) in SYNONYMS.get(column, ())


def _is_known(name: str) -> bool:
    return _folded(name) in COLUMNS or any(_is_synonym(name, column) for column in SYNONYMS)


def _renamed(table: Table) -> Table:
    """Return the table with synonyms renamed to COLUMNS. DataError if two columns match the same name."""
    new_names: dict[str, str] = {}
    for column in COLUMNS:
        same = [name for name in table.columns if _folded(name) == column]
        if column not in table.columns and len(same) > 1:
            raise DataError(
                f"{table.title}: {' and '.join(map(repr, same))} both denote the column {column}; rename one"
            )
        if column not in table.columns and same:
            new_names[same[0]] = column
    notes = []
    for column in SYNONYMS:
        if column in table.columns or column in new_names.values():
            continue
        like = [name for name in table.columns if _is_synonym(name, column) and name not in table.list_columns]
        if len(like) == 1 and _holds(table, like[0], column):
            new_names[like[0]] = column
            notes.append(f"the column {like[0]!r} is read as {column}")
    columns = {new_names.get(name, name): values for name, values in table.columns.items()}
    return replace(table, columns=columns, notes=(*table.notes, *notes))


def _holds(table: Table, name: str, column: str) -> bool:
    """Return whether a column's values fit the synonym: an existing first file, or names of splits."""
    values = [value for value in table.columns[name] if trimmed_name(value)]
    if column == "path":
        first = values[0] if values else ""
        return bool(scheme_of(first) or (first and _exists(table.file(_existing_path(table.path.parent, first)))))
    return column != "split" or all(split_of(value) for value in values)


def _exists(file: str) -> bool:
    return os.path.lexists(file) or archive_path(file) is not None


def _normalised(table: Table) -> Table:
    """Return the table with normalised paths, labels and splits. DataError names the row of an invalid value."""
    columns = dict(table.columns)
    for column in [name for name in COLUMNS[:3] if name in columns]:
        zero = next((row for row, value in enumerate(columns[column]) if "\0" in value), None)
        if zero is not None:
            raise DataError(
                f"{table.where(zero)}, column {column!r}: contains a zero byte; remove it, or save the table as UTF-8"
            )
    if "path" in columns:
        columns["path"] = [_path_at(table, row, value) for row, value in enumerate(columns["path"])]
    if "label" in columns:
        columns["label"] = [label_of(value) for value in _unquoted([*map(trimmed_name, columns["label"])])]
    if "split" in columns:
        columns["split"] = [split_of(value) or value for value in _unquoted([*map(trimmed_name, columns["split"])])]
    return replace(table, columns=columns)


def _unquoted(values: list[str]) -> list[str]:
    """Return the values without single quotes at their ends, if all values that are not empty have them (non-standard quoting)."""
    if not all(len(value) > 1 and value[0] == value[-1] == "'" for value in values if value):
        return values
    return [trimmed_name(value[1:-1].replace("';'", ";")) for value in values]


def _path_at(table: Table, row: int, value: str) -> str:
    if value.isascii() and value == value.strip() and not any(mark in value for mark in "\\:\"'"):
        return value
    if scheme_of(value):
        return _checked(table, row, value)
    path = _existing_path(table.path.parent, value)
    local = _exists(table.file(path))
    if not local and re.match(r"[A-Za-z][\w+.-]+://", path):
        raise DataError(
            f"{table.where(row)}, column 'path': {masked(value)!r} is a URL that Refract does not read; "
            f"accepted: {', '.join(f'{scheme}://' for scheme in STORAGES)}, and paths of files"
        )
    if not local and re.match(r"/?[A-Za-z]:/|//", path):
        raise DataError(
            f"{table.where(row)}, column 'path': {value!r} is a path on a Windows machine; write it relative to the table's folder"
        )
    return path


def _checked(table: Table, row: int, url: str) -> str:
    """Return a URL. DataError if it contains credentials."""
    if not is_remote(url):  # a storage of a plugin
        return url
    try:
        return checked(url)
    except AddressError as error:
        raise DataError(f"{table.where(row)}, column 'path': {error}") from error


def _existing_path(folder: Path, value: str) -> str:
    """Return the first interpretation of a path that exists.

    They are, in order: as written, without blanks and quotes at the ends, the path of a `file://` URL, with `/` for `\\`, and in another
    Unicode form. If none exists, return the one with `/`.
    """
    plain = trimmed_name(value)
    unquoted = trimmed_name(plain[1:-1]) if len(plain) > 1 and plain[0] == plain[-1] and plain[0] in "\"'" else plain
    try:
        address = urlsplit(unquoted) if unquoted.lower().startswith("file:/") else None
    except ValueError:  # a host in brackets that is not an address; the path is reported as missing
        address = None
    local = unquote(address.path) if address is not None and address.netloc in ("", "localhost") else unquoted
    slashes = local.replace("\\", "/")
    forms = [unicodedata.normalize(form, slashes) for form in ("NFC", "NFD")] if not slashes.isascii() else []
    readings = dict.fromkeys([value, plain, unquoted, local, slashes, *forms])
    return next((reading for reading in readings if reading and os.path.lexists(folder / reading)), slashes)
