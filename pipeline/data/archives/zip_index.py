"""Read the index of a zip from its central directory."""

import stat
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

from refract.pipeline.data.archives.index import DEFLATED, STORED, Index, Member, hidden, index_of
from refract.pipeline.data.errors import DataError

_METHODS = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
_UTF8, _ENCRYPTED = 0x800, 0x1


def zip_index(archive: str, file: BinaryIO) -> Index:
    """Return the index of a zip. DataError for a damaged or encrypted archive, and for members that are not plain files."""
    try:
        with zipfile.ZipFile(file) as opened:
            entries, size = opened.infolist(), file.seek(0, 2)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise DataError(
            f"{archive}: is damaged or incomplete ({error}); copy it again, and test it with `unzip -t`"
        ) from error
    if sum(entry.compress_size for entry in entries) > size:
        raise DataError(f"{archive}: its members overlap, as in a decompression bomb; create the archive again")
    return index_of(archive, _members(archive, entries, size))


def _members(archive: str, entries: list[zipfile.ZipInfo], size: int) -> Iterator[Member]:
    for entry in entries:
        name = _name(archive, entry)
        if not hidden(name) and not name.endswith("/"):
            _check(archive, name, entry)
        if entry.header_offset < 0 or entry.header_offset + entry.compress_size > size:
            raise DataError(f"{archive}: the member {name!r} is outside the archive, which is damaged; copy it again")
        method = _METHODS.get(entry.compress_type, STORED)
        yield Member(name, entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, method)


def _check(archive: str, name: str, entry: zipfile.ZipInfo) -> None:
    mode = entry.external_attr >> 16
    if entry.flag_bits & _ENCRYPTED:
        raise DataError(
            f"{archive}: the member {name!r} is encrypted; extract the archive, and create it again without a password"
        )
    if stat.S_IFMT(mode) and not stat.S_ISREG(mode):
        raise DataError(
            f"{archive}: the member {name!r} is a link or a device; create the archive with the files themselves (`zip -r`, without `-y`)"
        )
    if entry.compress_type not in _METHODS:
        raise DataError(
            f"{archive}: the member {name!r} is compressed with method {entry.compress_type}; create the archive with `zip -r` (deflate)"
        )


def _name(archive: str, entry: zipfile.ZipInfo) -> str:
    """Return the name as UTF-8: macOS writes UTF-8 without the flag that says so. DataError for other encodings."""
    name = entry.orig_filename
    if entry.flag_bits & _UTF8 or name.isascii():
        return name
    try:
        return name.encode("cp437").decode()
    except UnicodeError as error:
        raise DataError(
            f"{archive}: the name of the member {name!r} is not UTF-8; extract the archive, and create it again with UTF-8 names"
        ) from error
