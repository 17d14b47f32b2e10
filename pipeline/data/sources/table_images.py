"""Images in the columns of Parquet and Arrow tables, as Hugging Face `datasets` writes them, with their labels."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from refract.pipeline.data.archives.archive import index_of_archive, open_whole
from refract.pipeline.data.archives.parquet_images import (
    hugging_face_features,
    image_column,
    no_images_in,
    row_of,
    unreadable,
)
from refract.pipeline.data.errors import DataError
from refract.pipeline.data.sources.archive import unreadable_archive
from refract.pipeline.data.sources.shards import Shard, Shards, has_range, shards_of, shards_of_folder
from refract.pipeline.data.sources.source import Rows, Source
from refract.pipeline.data.sources.tables import COLUMNS, Table, normalised, texts_of
from refract.remote.address import is_remote

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_SUFFIX = ".parquet"


class ParquetImagesSource(Source):
    accepts: ClassVar[str] = ""

    @classmethod
    def recognises(cls, name: str) -> bool:
        if name.lower().endswith(_SUFFIX):
            if has_range(name):
                return True
            return (is_remote(name) or Path(name).is_file()) and has_images(name)
        shards = shards_of_folder(name, _SUFFIX)
        return shards is not None and has_images(shards.file(shards.files[0]))

    def rows(self, *, labelled: bool) -> Rows:
        """Read the columns label, split and text; all others are metadata. The order is that of the files and their rows."""
        return rows_of(self.name, shards_of(self.name, _SUFFIX), labelled=labelled)


def rows_of(name: str, shards: Shards, *, labelled: bool) -> Rows:
    """Return the rows of tables with images. name: as the user gave it."""
    columns: dict[str, list[str]] = {}
    count = 0
    for shard in shards.files:
        added = _columns(shards.file(shard), shard)
        size = len(added["path"])
        for column in dict.fromkeys([*columns, *added]):
            columns.setdefault(column, [""] * count).extend(added.get(column, [""] * size))
        count += size
    table = normalised(Table(Path(name), columns, name=name))
    if labelled and "label" not in table.columns:
        raise table.lacks("label", needed="an image and label[,split,text]")
    return Rows(
        name,
        table.texts("path"),
        shards.folder,
        labels=table.columns.get("label"),
        splits=table.columns.get("split"),
        texts=table.columns.get("text"),
        metadata={column: values for column, values in table.columns.items() if column not in COLUMNS},
        notes=table.notes,
    )


def has_images(file: str) -> bool:
    """Return whether a Parquet file has a column of images; false for a damaged file, which is reported as a table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_whole(file)[0] as opened:
            return image_column(file, pq.read_schema(opened)) is not None
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        return False


def _columns(file: str, shard: Shard) -> dict[str, list[str]]:
    """Return the columns of a file as text, with `path` for its images, and `split` if the name of the file has one."""
    table = _read(file)
    try:
        texts, _ = texts_of(_named(table, hugging_face_features(table.schema)))
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error
    paths = [""] * len(table)
    try:
        for member in index_of_archive(file).names:
            paths[row_of(member)] = f"{shard.path}/{member}"
    except OSError as error:
        raise unreadable_archive(error, file) from error
    columns = {str(name): list(texts[name]) for name in texts.columns}
    return {"path": paths, **columns, **({"split": [shard.split] * len(table)} if shard.split else {})}


def _read(file: str) -> "pa.Table":
    """Return the columns without images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.lower().endswith(_SUFFIX):
            with open_whole(file)[0] as opened:
                columns = _readable(file, pq.read_schema(opened))
                return pq.read_table(opened, columns=columns, partitioning=None)
        reader = pa.ipc.open_stream(pa.memory_map(file))
        return reader.read_all().select(_readable(file, reader.schema))
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise unreadable(file, error) from error


def _readable(file: str, schema: "pa.Schema") -> list[str]:
    """Return the columns other than the images, bytes and structs. DataError without a column of images."""
    import pyarrow as pa

    images = image_column(file, schema)
    if images is None:
        raise no_images_in(file, schema.names)
    skipped = (pa.types.is_struct, pa.types.is_binary, pa.types.is_large_binary)
    return [field.name for field in schema if field.name != images and not any(kind(field.type) for kind in skipped)]


def _free(name: str) -> str:
    """Return another name for a column that would be read as the path of the images."""
    return f"{name} (original)" if name.strip().casefold() == "path" else name


def _named(table: "pa.Table", features: Mapping[str, Any]) -> "pd.DataFrame":
    """Return the columns as a data frame, with the names of classes in place of their numbers."""
    frame = table.to_pandas(ignore_metadata=True, integer_object_nulls=True)
    for name in frame.columns:
        names = _class_names(features.get(name))
        if names is not None:
            frame[name] = [_label(value, names) for value in frame[name]]
    return frame.rename(columns=_free)


def _class_names(feature: Any) -> Sequence[str] | None:
    """Return the class names of a feature ClassLabel, or of a list of them; None for other features."""
    while isinstance(feature, list) and feature:
        feature = feature[0]
    while isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList"):
        feature = feature.get("feature")
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _label(value: Any, names: Sequence[str]) -> str:
    """Return the name of a class, or `a;b` for a list of classes; "" for -1 and missing values, which stand for no label."""
    return ";".join(_names(value, names))


def _names(value: Any, names: Sequence[str]) -> Iterator[str]:
    import numpy as np

    for number in np.atleast_1d(np.asarray(value if value is not None else [], dtype=np.float64)):
        if not np.isnan(number) and number >= 0:
            yield names[int(number)] if number < len(names) else str(int(number))
