"""Image bytes in the columns of Parquet and Arrow tables. The image of row 12 is the member `0000012.jpg` of its file."""

import json
import tarfile
from collections.abc import Sequence
from io import FileIO
from typing import TYPE_CHECKING, Any

from refract.augment.decoding.decode import SUFFIXES
from refract.pipeline.data.cache import Writer
from refract.pipeline.data.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

NAMES = ("image", "img", "images", "jpg", "png", "photo", "picture", "pixels", "bytes", "data", "content")
"""Names of a column of images, the most specific first."""

_MAGIC = (
    (0, b"\xff\xd8\xff", ".jpg"), (0, b"\x89PNG", ".png"), (8, b"WEBP", ".webp"), (0, b"GIF8", ".gif"), (0, b"BM", ".bmp"),
    (0, b"II*\0", ".tif"), (0, b"MM\0*", ".tif"), (4, b"ftypavif", ".avif"), (4, b"ftyphei", ".heic"),
)  # fmt: skip
BATCH = 64
"""Rows that are read at once."""


def hugging_face_features(schema: "pa.Schema") -> dict[str, Any]:
    """Return column → feature, as Hugging Face `datasets` describes them in the metadata of a file; {} without them."""
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = stored.get("info", {}).get("features", {})
    except (ValueError, AttributeError, RecursionError):  # of JSON that is nested too deeply
        return {}
    return features if isinstance(features, dict) else {}


def image_column(archive: str, schema: "pa.Schema") -> str | None:
    """Return the column with images: of bytes, or of structs with a field `bytes`; None without one. DataError for several ones."""
    features = hugging_face_features(schema)
    declared = [name for name, feature in features.items() if _is_image(feature) and name in schema.names]
    binary = [field.name for field in schema if _holds_bytes(field.type)]
    candidates = [name for name in declared if name in binary] or [
        name for name in binary if name.lower() in NAMES or _is_struct(schema.field(name).type)
    ]
    if len(candidates) > 1:
        candidates = [name for name in candidates if name.lower() == "image"] or candidates
    if len(candidates) > 1:
        raise DataError(
            f"{archive}: the columns {', '.join(map(repr, candidates))} may all be the image; name the one to read 'image'"
        )
    return candidates[0] if candidates else None


def _is_image(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "Image"


def _is_struct(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind))


def _holds_bytes(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if _is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def member_name(row: int, start: bytes) -> str:
    """Return the name of a row's image. row: counted from 0; start: its first bytes, which give the suffix."""
    suffix = next((suffix for at, magic, suffix in _MAGIC if start[at : at + len(magic)] == magic), SUFFIXES[0])
    return f"{row + 1:07}{suffix}"


def row_of(name: str) -> int:
    """Return the row of a member's name, counted from 0."""
    return int(name.partition(".")[0]) - 1


def bytes_of(value: Any) -> "pa.Scalar":
    """Return the scalar with the bytes of a value of the image column."""
    import pyarrow as pa

    return value["bytes"] if isinstance(value, pa.StructScalar) and value.is_valid else value


def images_to_tar(archive: str, file: FileIO, target: Writer) -> None:
    """Write the images of a Parquet table to a tar; rows without an image have no member. DataError for a damaged file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        column = image_column(archive, table.schema_arrow)
        if column is None:
            raise no_images_in(archive, table.schema_arrow.names)
        row = 0
        for batch in table.iter_batches(BATCH, columns=[column]):
            for value in batch.column(0):
                scalar = bytes_of(value)
                if scalar.is_valid and (data := scalar.as_py()):
                    _add(target, member_name(row, data[:16]), data)
                row += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError) or getattr(error, "filename", None) is not None:
            raise  # of the table's columns, or of the cache
        raise unreadable(archive, error) from error
    target.write(bytes(2 * tarfile.BLOCKSIZE))


def _add(target: Writer, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    target.write(entry.tobuf(tarfile.GNU_FORMAT))
    target.write(data)
    target.write(bytes(-len(data) % tarfile.BLOCKSIZE))


def no_images_in(archive: str, columns: Sequence[str]) -> DataError:
    """Return the error for a table without a column of images."""
    return DataError(
        f"{archive}: no column holds images as bytes; columns: {', '.join(map(repr, columns))}; accepted: bytes, or struct with "
        "the field bytes, named 'image'"
    )


def unreadable(archive: str, error: Exception) -> DataError:
    """Return the error for a damaged table."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    kind = "an Arrow" if archive.lower().endswith(".arrow") else "a PARQUET"
    return DataError(f"{archive}: cannot be read as {kind} table ({reason}); copy it again")
