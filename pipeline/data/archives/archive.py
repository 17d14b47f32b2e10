"""Open archives: find the archive in a path, keep its index, and read its members."""

import errno
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

from refract.pipeline.data import cache
from refract.pipeline.data.archives.arrow_index import arrow_index
from refract.pipeline.data.archives.index import Index, read_member
from refract.pipeline.data.archives.parquet_images import images_to_tar
from refract.pipeline.data.archives.tar_index import tar_index
from refract.pipeline.data.archives.unpacking import unpack
from refract.pipeline.data.archives.zip_index import zip_index
from refract.pipeline.data.errors import DataError
from refract.pipeline.files import open_file
from refract.remote.address import is_remote

log = logging.getLogger(__name__)

IndexBuilder = Callable[[str, BinaryIO], Index]
Conversion = Callable[[str, FileIO, cache.Writer], None]
"""(path of the archive, the open archive, target): write an uncompressed tar of its members."""

ZIPS, TARS, COMPRESSED = (".zip",), (".tar",), (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

INDEXES: Mapping[str, IndexBuilder] = MappingProxyType({
    **dict.fromkeys(ZIPS, zip_index), **dict.fromkeys(TARS, tar_index), ".arrow": arrow_index
})  # fmt: skip
"""Suffix → function that finds the members of an archive with random access."""

CONVERSIONS: Mapping[str, Conversion] = MappingProxyType({
    **dict.fromkeys(COMPRESSED, unpack), ".parquet": images_to_tar
})  # fmt: skip
"""Suffix → function that writes the members to a tar in the cache, as the archive has no random access."""

_SUFFIX = "|".join(map(re.escape, (*CONVERSIONS, *INDEXES)))
_MARK, _END = (re.compile(rf"(?:{_SUFFIX}){end}", re.IGNORECASE) for end in ("(?=/|$)", "$"))
"""The end of an archive's name in a path, and at the end of it."""

_VERSION = 1
"""Of the stored indexes and tars."""


class ArchivePath(NamedTuple):
    """archive: path of the archive; member: path in it, "" for the archive itself."""

    archive: str
    member: str


class _Opened(NamedTuple):
    """file: the archive, or its tar in the cache; identity: changes with the content; build: finds its members."""

    file: FileIO
    identity: str
    build: IndexBuilder


_indexes: dict[str, tuple[str, Index]] = {}
"""Path of an archive → (identity of the indexed content, index)."""
_lock = threading.Lock()


def suffix_of(path: str) -> str:
    """Return the suffix by which an archive is read, such as `.tar.gz`; "" for other names."""
    match = _END.search(path, max(0, len(path) - 9))
    return match[0].lower() if match is not None else ""


def archive_path(path: str) -> ArchivePath | None:
    """Return the archive that a path leads into, `photos.zip` of `photos.zip/cat/1.jpg`; None for other paths."""
    path, remote = path.rstrip("/"), is_remote(path)
    for match in _MARK.finditer(path, path.find("/", path.find("://") + 3) if remote else 0):
        if remote or os.path.isfile(path[: match.end()]):  # noqa: PTH113 — runs for each image
            return ArchivePath(path[: match.end()], path[match.end() + 1 :])
    return None


def index_of_archive(archive: str) -> Index:
    """Return the members of an archive. DataError for an archive that cannot be read, OSError if the file cannot be opened."""
    with open_archive(archive) as (index, _):
        return index


@contextmanager
def open_archive(archive: str) -> Iterator[tuple[Index, Callable[[str], bytes]]]:
    """Yield (the members, a function that returns the content of one). Raises as `read_from_archive`."""
    opened = _opened(archive)
    with opened.file:
        index = _index(archive, opened)

        def read(name: str) -> bytes:
            member, path = index.find(name), f"{archive}/{name}"
            if member is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return read_member(opened.file.fileno(), path, member)

        yield index, read


def read_from_archive(where: ArchivePath) -> bytes:
    """Return the content of a member. OSError if there is none, or it is damaged; DataError as `index_of_archive`."""
    with open_archive(where.archive) as (_, read):
        return read(where.member)


def _opened(archive: str) -> _Opened:
    """Open the archive, or the tar in the cache that it is converted to."""
    suffix = suffix_of(archive)
    file, identity = open_whole(archive)
    if suffix in INDEXES:
        return _Opened(file, identity, INDEXES[suffix])
    with file:

        def write(entry: cache.Writer) -> None:
            log.info("unpacking %s into the cache %s", archive, cache.folder())
            CONVERSIONS[suffix](archive, file, entry)

        tar = cache.opened("archives", f"{_VERSION} {identity}", write, title=archive)
    return _Opened(tar, f"tar {identity}", tar_index)


def open_whole(archive: str) -> tuple[FileIO, str]:
    """Return (a local file, or a remote one in the cache; a text that changes when its content does). OSError, RemoteError."""
    if is_remote(archive):
        from refract.pipeline.data.remote_files import whole_file

        return whole_file(archive)
    file = open_file(archive)
    status = os.fstat(file.fileno())
    numbers = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return file, f"{os.path.abspath(archive)} {numbers}"  # noqa: PTH100 — a tenth of the time of pathlib


def _index(archive: str, opened: _Opened) -> Index:
    """Return the index of this process, of the cache, or a new one."""
    known = _indexes.get(archive)
    if known is None or known[0] != opened.identity:
        with _lock:
            known = _indexes.get(archive)
            if known is None or known[0] != opened.identity:
                known = _indexes[archive] = (opened.identity, _stored_index(archive, opened))
    return known[1]


def _stored_index(archive: str, opened: _Opened) -> Index:
    built: list[Index] = []
    key = f"{_VERSION} {opened.identity}"

    def write(entry: cache.Writer) -> None:
        built.append(opened.build(archive, opened.file))
        entry.write(built[0].to_bytes())

    try:
        with cache.opened("indexes", key, write, title=f"index of {archive}") as file:
            if not built:
                return Index.from_bytes(file.readall())
    except (OSError, ValueError, cache.CacheError) as error:
        if isinstance(error, DataError):
            raise  # of the archive
        log.debug("the index of %s is not stored: %s", archive, error)
        cache.removed("indexes", key)
    return built[0] if built else opened.build(archive, opened.file)
