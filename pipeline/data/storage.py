"""Where the images of samples are stored. A further storage is a class with the methods of `Storage`, and an entry in STORAGES."""

import errno
import hashlib
import io
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Protocol

from refract.pipeline.data.errors import DataError
from refract.pipeline.files import open_file
from refract.remote.address import SCHEMES

SETTLED_NS = 2_000_000_000
"""Age of a local file's last change, from which on it has a state. A younger file could change again within one tick of its clock."""

State = tuple[int, int, int, int]
"""Four numbers in the range of int64 that change with the content of a file. For a member of an archive, they are those of the archive."""


class Storage(Protocol):
    """Reads files by their path, which starts with the scheme that STORAGES names. A process reads one version of each file."""

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading. OSError if it cannot be read."""

    def state(self, path: str) -> State | None:
        """Return the state of a file without reading it; None if that is unknown, or if there is no such file."""

    def is_at_hand(self, path: str) -> bool:
        """Return whether the content is on this machine, so that a file with a known state can be read later."""


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

    def state(self, path: str) -> State | None:
        """Size, inode, and the times of the last change of content and of attributes, which no program can set."""
        try:
            facts = _status(path)
        except (OSError, ValueError):  # reading it reports why
            return None
        if max(facts.st_mtime_ns, facts.st_ctime_ns) > time.time_ns() - SETTLED_NS:
            return None
        return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino

    def is_at_hand(self, path: str) -> bool:
        return True


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)  # noqa: PTH116 — a Path takes five times as long
    except NotADirectoryError:
        from refract.pipeline.data.archives.archive import archive_path

        where = archive_path(path)
        if where is None:
            raise
        return os.stat(where.archive)  # noqa: PTH116 — as above


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

    def state(self, path: str) -> State | None:
        """The digest of the version of a listed file, or of the archive. Other files have no state before they are read."""
        from refract.pipeline.data.remote_files import known_version
        from refract.remote.web import UNVERSIONED

        item = None if (file := _file_of(path)) is None else known_version(file)
        if item is None or item.version == UNVERSIONED:
            return None
        digest = hashlib.sha256(f"{item.version} {item.size}".encode()).digest()
        first, second, third, fourth = struct.unpack("4q", digest)
        return first, second, third, fourth

    def is_at_hand(self, path: str) -> bool:
        from refract.pipeline.data.remote_files import is_cached

        file = _file_of(path)
        return file is not None and is_cached(file)


def _file_of(url: str) -> str | None:
    """Return the URL of the file that a listing has, or that of the archive of a member; None for others, as those in tables."""
    from refract.pipeline.data.archives.archive import archive_path
    from refract.pipeline.data.remote_files import is_listed

    if is_listed(url):
        return url
    where = archive_path(url)
    return where.archive if where is not None and where.member else None


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


def state_of(path: str) -> State | None:
    """Return the state of a file, see `Storage.state`."""
    return STORAGES.get(scheme_of(path), LOCAL).state(path)


def is_at_hand(path: str) -> bool:
    """Return whether the content of a file is on this machine, see `Storage.is_at_hand`."""
    return STORAGES.get(scheme_of(path), LOCAL).is_at_hand(path)


def read(path: str) -> bytes:
    """Return the content of a file. OSError as `open_stored`."""
    with open_stored(path) as file:
        return file.read()


def sha256(path: str) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal. OSError as `open_stored`."""
    return hashlib.sha256(read(path)).hexdigest()
