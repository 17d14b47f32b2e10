"""Find the images in an Arrow file that Hugging Face `datasets` saved: they lie uncompressed in it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from refract.pipeline.data.archives.index import Index, Member, index_of
from refract.pipeline.data.archives.parquet_images import image_column, member_name, no_images_in, unreadable
from refract.pipeline.data.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


def arrow_index(archive: str, file: BinaryIO) -> Index:
    """Return the index of an Arrow stream. DataError for a damaged file, and for compressed data."""
    import pyarrow as pa

    try:
        return index_of(archive, _members(archive, file))
    except (pa.ArrowException, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise unreadable(archive, error) from error


def _members(archive: str, file: BinaryIO) -> Iterator[Member]:
    import pyarrow as pa

    whole = pa.memory_map(file.name).read_buffer()
    reader = pa.ipc.open_stream(whole)
    column = image_column(archive, reader.schema)
    if column is None:
        raise no_images_in(archive, reader.schema.names)
    row = 0
    for batch in reader:
        for start, end in _positions(batch.column(column), whole.address):
            if end > start:
                if not 0 <= start < end <= whole.size:
                    raise DataError(
                        f"{archive}: is compressed; save the data set again with `save_to_disk`, or as Parquet"
                    )
                yield Member(member_name(row, whole[start : start + 16].to_pybytes()), start, end - start, end - start)
            row += 1


def _positions(column: "pa.Array", address: int) -> list[tuple[int, int]]:
    """Return (start, end) of each value in the file, equal for a missing one. address: of the file in memory."""
    import numpy as np
    import pyarrow as pa

    valid = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.field("bytes") if pa.types.is_struct(column.type) else column
    valid &= values.is_valid().to_numpy(zero_copy_only=False)
    _, offsets, data = values.buffers()
    wide = pa.types.is_large_binary(values.type)
    bounds = np.frombuffer(offsets, np.int64 if wide else np.int32)[values.offset : values.offset + len(values) + 1]
    starts = bounds.astype(np.int64) + ((data.address if data is not None else address) - address)
    ends = np.where(valid, starts[1:], starts[:-1])
    return list(zip(starts[:-1].tolist(), ends.tolist(), strict=True))
