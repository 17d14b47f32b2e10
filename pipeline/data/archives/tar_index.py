"""Read the index of an uncompressed tar from the headers of its members."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from refract.pipeline.data.archives.index import Index, Member, hidden, index_of
from refract.pipeline.data.errors import DataError

BLOCK = 512


def tar_index(archive: str, file: BinaryIO) -> Index:
    """Return the index of a tar. DataError for a damaged or incomplete archive, and for links, devices and sparse files."""
    try:
        return index_of(archive, _members(archive, file))
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:  # thousands of headers for one member
        if isinstance(error, DataError):
            raise
        raise _incomplete(archive, str(error)) from error


def _members(archive: str, file: BinaryIO) -> Iterator[Member]:
    size = file.seek(0, 2)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as opened:
        while (entry := opened.next()) is not None:
            vars(opened)["members"] = []  # which would keep the header of every member
            folder = entry.isdir()
            if not folder and not hidden(entry.name):
                if entry.islnk() or entry.issym():
                    raise DataError(
                        f"{archive}: the member {entry.name!r} is a link; create the archive with `tar --dereference --hard-dereference`"
                    )
                if not entry.isreg() or entry.sparse is not None:
                    kind = "sparse file" if entry.isreg() else "device or pipe"
                    raise DataError(f"{archive}: the member {entry.name!r} is a {kind}; archives may hold plain files")
            if entry.size < 0:  # `tarfile` would read the same headers again, without an end
                raise _incomplete(archive, f"the member {entry.name!r} has a negative size")
            if entry.offset_data + entry.size > size:
                raise _incomplete(archive, f"the member {entry.name!r} is cut off")
            if folder or entry.isreg():
                yield Member(f"{entry.name}/" if folder else entry.name, entry.offset_data, entry.size, entry.size)
        end = opened.offset
    # `tarfile` ends silently at a damaged header. The end of a complete archive is a block of zeros.
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):
        raise _incomplete(archive, f"byte {end:,} starts neither a member nor the end of the archive")


def _incomplete(archive: str, reason: str) -> DataError:
    return DataError(f"{archive}: is damaged or incomplete ({reason}); copy it again, and test it with `tar -tf`")
