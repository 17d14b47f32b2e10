"""WebDataset: tars whose members `KEY.jpg`, `KEY.cls`, `KEY.txt` and `KEY.json` are one sample."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from refract.augment.image_files import is_image
from refract.pipeline.data.archives.archive import COMPRESSED, TARS, index_of_archive, open_archive, suffix_of
from refract.pipeline.data.archives.index import hidden
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.pack_record import complete_record, is_pack
from refract.pipeline.data.sources.archive import unreadable_archive
from refract.pipeline.data.sources.shards import Shard, Shards, has_range, shards_of, shards_of_folder
from refract.pipeline.data.sources.source import Rows, Source
from refract.pipeline.data.sources.tables import COLUMNS, SYNONYMS, Table, normalised
from refract.remote.address import is_remote

_TEXTS = {"cls": "label", "txt": "text"}
"""Suffix of a member with a text → the column that it fills."""


class WebDatasetSource(Source):
    accepts: ClassVar[str] = ""

    @classmethod
    def recognises(cls, name: str) -> bool:
        if suffix_of(name) in (*TARS, *COMPRESSED):
            return has_range(name) or ((is_remote(name) or Path(name).is_file()) and has_samples(name))
        if is_pack(Path(name)):
            return complete_record(Path(name)) is not None  # which reports a missing tar
        shards = shards_of_folder(name, TARS[0])
        return shards is not None and has_samples(shards.file(shards.files[0]))

    def rows(self, *, labelled: bool) -> Rows:
        """Read the samples in the order of the tars and their members. The fields of `.json` other than label and text are metadata.

        A pack also has the classes without a sample, which the packed data had.
        """
        shards = shards_of(self.name, TARS[0])
        record = complete_record(shards.folder) if shards.folder is not None else None
        rows = rows_of(self.name, shards, labelled=labelled)
        return replace(rows, classes=record.labels) if record is not None else rows


def rows_of(name: str, shards: Shards, *, labelled: bool) -> Rows:
    """Return the rows of tars. name: as the user gave it."""
    columns, count = dict[str, list[str]](), 0
    for shard in shards.files:
        for row in _samples(shards.file(shard), shard):
            for column in row:  # in their order, which that of a set would change in each process
                if column not in columns:
                    columns[column] = [""] * count
            for column, values in columns.items():
                values.append(row.get(column, ""))
            count += 1
    table = normalised(Table(Path(name), {"path": [], **columns}, name=name))
    if labelled and "label" not in table.columns:
        raise DataError(f"{name}: no sample has a label; write KEY.cls, or KEY.json with the field `label`")
    metadata = {column: values for column, values in table.columns.items() if column not in COLUMNS}
    labels, splits, texts = (table.columns.get(column) for column in ("label", "split", "text"))
    return Rows(name, table.texts("path"), shards.folder, labels, splits, texts, metadata=metadata)


def has_samples(tar: str) -> bool:
    """Return whether a tar has members `KEY.cls`, or images outside folders with `KEY.json` next to them; else it has class folders."""
    try:
        names = [name for name in index_of_archive(tar).names if not hidden(name)]
    except OSError as error:
        raise unreadable_archive(error, tar) from error
    if any(name.lower().endswith(".cls") for name in names):
        return True
    described = {_key(name)[0] for name in names if name.lower().endswith(".json")}
    images = [name for name in names if is_image(name)]
    return bool(images) and all("/" not in name and _key(name)[0] in described for name in images)


def _key(name: str) -> tuple[str, str]:
    """Return (key, suffix) of a member: its name up to the first dot after the folder, and the rest in lower case."""
    folder, slash, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return f"{folder}{slash}{key}", suffix.lower()


def _samples(tar: str, shard: Shard) -> list[dict[str, str]]:
    """Return the columns of each sample. DataError for a sample without an image and a text, or with two images."""
    try:
        with open_archive(tar) as (index, read):
            members: dict[str, dict[str, str]] = {}
            for name in index.names:
                if not name.endswith("/") and not hidden(name):
                    key, suffix = _key(name)
                    members.setdefault(key, {})[suffix] = name
            return [_sample(tar, shard, key, of_key, read) for key, of_key in members.items()]
    except OSError as error:
        raise unreadable_archive(error, tar) from error


def _sample(
    tar: str, shard: Shard, key: str, members: Mapping[str, str], read: Callable[[str], bytes]
) -> dict[str, str]:
    images = [name for suffix, name in members.items() if is_image(f".{suffix}")]
    if len(images) > 1 or not (images or "txt" in members or "json" in members):
        which = f"two images ({images[0]}, {images[1]})" if images else f"no image ({', '.join(members.values())})"
        raise DataError(f"{tar}: the sample {key!r} has {which}; write one image for each key")
    row = {"path": f"{shard.path}/{images[0]}" if images else ""}
    if shard.split:
        row["split"] = shard.split
    if "json" in members:
        row |= _fields(f"{tar}/{members['json']}", read(members["json"]))
    for suffix, column in _TEXTS.items():
        if suffix in members:
            text = _decoded(f"{tar}/{members[suffix]}", read(members[suffix]))
            row[column] = text if column == "text" else text.strip()
    return row


def _fields(member: str, data: bytes) -> dict[str, str]:
    """Return the fields of a JSON object as columns; `label`, `text` and `split` also from other names."""
    try:
        content = json.loads(_decoded(member, data))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{member}: is not JSON ({error}); write an object") from error
    if not isinstance(content, dict):
        raise DataError(f"{member}: is not a JSON object; write an object with the field `label`")
    texts = {str(name): text for name, value in content.items() if (text := _text(value)) is not None}
    fields = {_column(name): text for name, text in texts.items() if _column(name) not in texts}
    fields |= {name: text for name, text in texts.items() if name != "path"}
    return fields


def _column(name: str) -> str:
    folded = name.strip().casefold()
    if folded in SYNONYMS["label"] or folded == "cls":
        return "label"
    return {"caption": "text", "path": "path (original)"}.get(folded, name)


def _text(value: Any) -> str | None:
    """Return a value as the text of a column: a list as `a;b`; None for objects and null."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str | int) for item in value):
        return ";".join(map(str, value))
    return None


def _decoded(member: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{member}: is not UTF-8 ({error.reason}); write it as UTF-8") from error
