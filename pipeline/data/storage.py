"""Where the images of samples are stored. A further storage is a class with `open` and an entry in STORAGES."""

import errno
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Protocol

from refract.pipeline.data.errors import DataError
from refract.pipeline.files import open_file
from refract.remote.address import SCHEMES


class Storage(Protocol):
    """Opens files by their path, which starts with the scheme that STORAGES names."""

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading. OSError if it cannot be read."""


class LocalFiles:
    """The file system, and the members of archives in it: `photos.zip/cat/1.jpg`."""

    def open(self, path: str) -> BinaryIO:
        try:
            return open_file(path)
        except NotADirectoryError:
            from refract.pipeline.data.archives.archive import archive_path, read_from_archive

            where = archive_path(path)
            if where is None:
                raise
            try:
                return io.BytesIO(read_from_archive(where))
            except DataError as error:
                raise OSError(errno.EIO, str(error), path) from error


LOCAL = LocalFiles()


class RemoteFiles:
    """Remote files, and the members of remote archives: `s3://bucket/photos.zip/cat/1.jpg`. Their libraries are imported on first use.

    RemoteError if a server cannot be reached, CacheError if the cache cannot be written: the file may be good.
    """

    def open(self, path: str) -> BinaryIO:
        from refract.pipeline.data.archives.archive import archive_path, read_from_archive
        from refract.pipeline.data.remote_files import content, is_listed, whole_file

        where = archive_path(path)
        try:
            if where is None or (where.member and is_listed(path)):  # a folder may be named as an archive
                return io.BytesIO(content(path))
            if where.member:
                return io.BytesIO(read_from_archive(where))
            return io.BufferedReader(whole_file(path)[0])
        except DataError as error:
            raise OSError(errno.EIO, str(error), path) from error


STORAGES: Mapping[str, Storage] = MappingProxyType(dict.fromkeys(SCHEMES, RemoteFiles()))
"""Scheme of a path such as `s3://bucket/cat.png` → storage. Paths with another scheme, or without one, are local."""


def scheme_of(path: str) -> str:
    """Return the scheme of a path, if STORAGES has it; else ""."""
    scheme, mark, _ = path.partition("://")
    return scheme if mark and scheme in STORAGES else ""


def absolute(path: str) -> str:
    """Return the absolute path of a file, with links resolved; the path of another storage as it is."""
    return path if scheme_of(path) else str(Path(path).resolve())


def open_stored(path: str) -> BinaryIO:
    """Open a file for reading. OSError if it cannot be read, and for pipes and devices, whose reads may not end."""
    return STORAGES.get(scheme_of(path), LOCAL).open(path)


def read(path: str) -> bytes:
    """Return the content of a file. OSError as `open_stored`."""
    with open_stored(path) as file:
        return file.read()


def sha256(path: str) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal. OSError as `open_stored`."""
    return hashlib.sha256(read(path)).hexdigest()
