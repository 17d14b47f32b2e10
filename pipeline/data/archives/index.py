"""The index of an archive: the position of each member, so that a member is read without the others."""

import errno
import io
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from refract.augment.image_files import is_hidden, is_image
from refract.pipeline.data.errors import DataError

if TYPE_CHECKING:
    import numpy as np

LARGEST = 1 << 30
"""Bytes of the largest image that is read from an archive."""
RAW, STORED, DEFLATED = 0, 1, 2
"""How a member is stored: as is; in a zip, after its local header, as is or compressed."""
_LOCAL_HEADER = 30
"""Bytes of a zip's local header before the name and the extra field."""


class Member(NamedTuple):
    """offset: of the data, or of the local header of a zip, in the archive; stored: bytes in the archive; size: bytes of the content;
    crc: CRC-32 of the content, or -1; method: RAW, STORED or DEFLATED."""

    name: str
    offset: int
    stored: int
    size: int
    crc: int = -1
    method: int = RAW


@dataclass(frozen=True)
class Index:
    """The members of an archive in its order. names: paths in the archive, those of folders end with `/`; table: int64 (N, 5), the
    fields of `Member` after the name."""

    names: Sequence[str]
    table: "np.ndarray"

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def find(self, name: str) -> Member | None:
        row = self._row_of.get(name)
        return None if row is None else Member(name, *self.table[row].tolist())

    def to_bytes(self) -> bytes:
        import numpy as np

        file = io.BytesIO()
        names = np.frombuffer("\0".join(self.names).encode(), np.uint8)
        np.savez(file, names=names, table=self.table)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Index":
        """Raises ValueError for other bytes."""
        import numpy as np

        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                names, table = arrays["names"].tobytes().decode(), arrays["table"]
        except (EOFError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"the index is damaged ({error})") from error
        listed = names.split("\0") if len(table) else []
        if len(listed) != len(table):
            raise ValueError("the index is damaged")
        return cls(listed, table)


def index_of(archive: str, members: Iterable[Member]) -> Index:
    """Build the index. DataError names a member with an unsafe or repeated name, and an image that is too large.

    archive: path, for errors.
    """
    import numpy as np

    names, rows = list[str](), list[tuple[int, ...]]()
    seen, folders = set[str](), set[str]()
    for member in members:
        name = _checked_name(archive, member.name)
        if not name:
            continue
        if name.endswith("/"):
            if name in folders:
                continue  # archives repeat folders
            folders.add(name)
        elif name in seen:
            raise DataError(
                f"{archive}: contains two members {name!r}; extract the archive, which keeps the last one, and create it again"
            )
        if is_image(name) and not hidden(name) and member.size > LARGEST:
            raise DataError(
                f"{archive}: the member {name!r} has {member.size:,} bytes; at most {LARGEST:,} are read from an archive"
            )
        seen.add(name)
        names.append(name)
        rows.append(member[1:])
    both = next((name for name in names if any(parent in seen for parent in _parents(name))), None)
    if both is not None:
        raise DataError(f"{archive}: the member {both!r} is below a member that is a file; create the archive again")
    return Index(names, np.array(rows, np.int64).reshape(-1, len(Member._fields) - 1))


def hidden(name: str) -> bool:
    """Return whether a member or one of its folders is hidden or belongs to a system, such as `__MACOSX/._1.jpg`."""
    return any(is_hidden(part) for part in name.rstrip("/").split("/"))


def _parents(name: str) -> Iterable[str]:
    """Return the paths of the folders above a member, without a slash at the end."""
    parts = name.rstrip("/").split("/")[:-1]
    return ("/".join(parts[: i + 1]) for i in range(len(parts)))


def _checked_name(archive: str, name: str) -> str:
    """Return the normalised path of a member: without `./` and repeated slashes; "" for the root. DataError for an unsafe name."""
    shown = ascii(name)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{archive}: the name of the member {shown} is not UTF-8; extract the archive, rename the files (`convmv`), and create it again"
        ) from error
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise DataError(f"{archive}: the member {shown} leads out of the archive; create it again with relative names")
    if "\\" in name or name[1:3] == ":/":
        raise DataError(f"{archive}: the member {shown} has a Windows path; create the archive again with `/` in names")
    plain = "/".join(part for part in parts if part not in ("", "."))
    return f"{plain}/" if plain and name.endswith("/") else plain


def read_member(handle: int, path: str, member: Member) -> bytes:
    """Return the content of a member. handle: descriptor of the archive; path: for errors. OSError for damaged content.

    Reads at offsets, so that threads and forked processes share a descriptor.
    """
    offset = member.offset
    if member.method != RAW:
        header = os.pread(handle, _LOCAL_HEADER, offset)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise _damaged(path, "the local header is missing")
        offset += _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if member.size > LARGEST:
        raise _damaged(path, f"has {member.size:,} bytes; at most {LARGEST:,} are read")
    data = _pread(handle, member.stored, offset)
    if len(data) < member.stored:
        raise _damaged(path, "the archive is truncated")
    if member.method == DEFLATED:
        data = _inflated(data, path, member.size)
    if len(data) != member.size or (member.crc >= 0 and zlib.crc32(data) != member.crc):
        raise _damaged(path, "the content does not fit its checksum")
    return data


def _pread(handle: int, size: int, offset: int) -> bytes:
    data = os.pread(handle, size, offset)
    while len(data) < size and (more := os.pread(handle, size - len(data), offset + len(data))):
        data += more  # one call reads at most 2 GiB
    return data


def _inflated(data: bytes, path: str, size: int) -> bytes:
    """Decompress at most `size` bytes, and one to notice that there are more."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise _damaged(path, "the compressed data are invalid") from error


def _damaged(path: str, reason: str) -> OSError:
    return OSError(errno.EIO, f"the archive is damaged: {reason}", path)
