"""A bounded cache on disk for data that can be computed or fetched again. The least recently used entries are removed first.

Threads, worker processes and ranks share it: an entry is written by one of them, under a lock, and appears complete or not at all.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Protocol

from refract.cache_folder import VARIABLE as FOLDER
from refract.cache_folder import cache_folder
from refract.errors import ServiceError
from refract.pipeline.files import locked, open_file, written_atomically

log = logging.getLogger(__name__)

SIZE = "REFRACT_CACHE_SIZE"
DEFAULT_SIZE = "50GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
KEPT = 0.9
"""Fraction of the limit that remains after old entries are removed, so that this is rare."""
USED_S = 60.0
"""Seconds in which a further use of an entry is not recorded."""
_ENTRY = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\..+")
LOCKS = 64
"""Number of lock files of each kind of entries: different entries rarely wait for each other."""


class CacheError(ServiceError):
    """Raised if the cache cannot hold an entry. No OSError: an image that cannot be stored is not an unreadable image."""


class Writer(Protocol):
    """Accepts the bytes of an entry."""

    def write(self, data: bytes, /) -> int: ...


def folder() -> Path:
    """Return the folder of the entries."""
    return cache_folder() / "data"


def limit() -> int:
    """Return the largest size of the cache in bytes, from REFRACT_CACHE_SIZE. CacheError for an invalid value."""
    text = os.environ.get(SIZE, "") or DEFAULT_SIZE
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise CacheError(f"{SIZE}: {text!r} is not a size; write a number of bytes, or a number with KB, MB, GB or TB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def opened(kind: str, key: str, write: Callable[[Writer], object], *, title: str, sync: bool = True) -> FileIO:
    """Open the entry for reading, and create it if the cache lacks it.

    kind: name of a folder, such as `archives`; key: text that identifies the content; write: writes the content; title: names the entry in
    errors; sync: as in `written_atomically`. An open entry stays readable if it is removed. CacheError if the cache cannot hold it; errors
    of `write`.
    """
    path = _path(kind, key)
    for _ in range(3):  # another process may remove the entry before it is opened
        try:
            file = open_file(path)
        except FileNotFoundError:
            _create(kind, path, write, title, sync)
            continue
        except OSError as error:
            raise _unusable(title, error) from error
        _record_use(file)
        return file
    raise CacheError(f"{title}: the cache {folder()} is too small for the data in use; raise {SIZE}")


def content(kind: str, key: str) -> bytes | None:
    """Return the content of an entry; None if the cache lacks it."""
    try:
        with open_file(_path(kind, key)) as file:
            return file.readall()
    except OSError:
        return None


def contains(kind: str, key: str) -> bool:
    """Return whether the cache has the entry."""
    return os.path.exists(_path(kind, key))  # noqa: PTH110 — runs for each image


def removed(kind: str, key: str) -> None:
    """Remove the entry, as its content is damaged or out of date. `opened` reports a cache that cannot be written."""
    with suppress(OSError):
        _path(kind, key).unlink()


def _path(kind: str, key: str) -> Path:
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
    return folder() / kind / digest[:2] / digest


def _create(kind: str, path: Path, write: Callable[[Writer], object], title: str, sync: bool) -> None:
    root = folder()
    try:
        (root / "locks").mkdir(parents=True, exist_ok=True)
        with locked(root / "locks" / f"{kind}-{int(path.name[:8], 16) % LOCKS}"):
            if path.exists():  # another process has written it
                return
            with written_atomically(path, sync=sync) as file:
                entry = _Entry(file, root, title)
                write(entry)
    except OSError as error:
        if not str(error.filename or "").startswith(str(root.parent)):
            raise
        raise _unusable(title, error) from error


def _unusable(title: str, error: OSError) -> CacheError:
    return CacheError(
        f"{title}: cannot be stored in the cache {folder()} ({error.strerror}); set {FOLDER} to a writable folder with free space"
    )


class _Entry:
    """An entry while it is written: its bytes are counted before they are written, and old entries make way for them."""

    def __init__(self, file: BinaryIO, root: Path, title: str) -> None:
        self.file, self.root, self.title, self.size, self.limit = file, root, title, 0, limit()
        self.counted = 0

    def write(self, data: bytes, /) -> int:
        self.size += len(data)
        if self.size > self.limit * KEPT:
            raise CacheError(
                f"{self.title}: is larger than the cache ({self.limit:,} bytes); raise {SIZE} (such as {SIZE}=200GB)"
            )
        if self.size > self.counted:  # in steps, so that a long entry does not lock the counter for each block
            step = max(len(data), min(self.size, 16 << 20))
            _count(self.root, step, self.limit)
            self.counted += step
        try:
            return self.file.write(data)
        except OSError as error:
            error.filename = str(self.root)  # else a full disk would seem to be an error of the converted data
            raise


def _count(root: Path, size: int, limit: int) -> None:
    """Add bytes to the counter of the cache; remove entries if it exceeds the limit."""
    with locked(root / "locks" / "size") as handle:
        text = os.pread(handle, 32, 0).decode()
        total = (int(text) if text.isdigit() else _measured(root)) + size
        if total > limit:
            total = _evict(root, int(limit * KEPT) - size) + size
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(total).encode(), 0)


def _entries(root: Path) -> Iterator["os.DirEntry[str]"]:
    """Yield the entries and temporary files: by their names, so that no other file in the folder is removed."""
    for kind in os.scandir(root):
        if kind.name == "locks" or not kind.is_dir(follow_symlinks=False):
            continue
        for part in os.scandir(kind):
            if part.is_dir(follow_symlinks=False):
                yield from (entry for entry in os.scandir(part) if _ENTRY.fullmatch(entry.name))


def _statuses(root: Path) -> Iterator[tuple["os.DirEntry[str]", os.stat_result]]:
    for entry in _entries(root):
        with suppress(FileNotFoundError):  # another process has renamed or removed it
            yield entry, entry.stat(follow_symlinks=False)


def _measured(root: Path) -> int:
    return sum(status.st_size for _, status in _statuses(root))


def _evict(root: Path, target: int) -> int:
    """Remove the least recently used entries until at most `target` bytes remain. Return the size of the rest."""
    used, total = [], 0
    for entry, status in _statuses(root):
        total += status.st_size
        # A temporary file is being written, unless its process has died long ago.
        if not entry.name.startswith(".") or time.time() - status.st_mtime > 86400:
            used.append((status.st_mtime_ns, status.st_size, entry.path))
    for _, size, path in sorted(used):
        if total <= target:
            break
        Path(path).unlink(missing_ok=True)
        total -= size
    return total


def _record_use(file: FileIO) -> None:
    """Set the file's modification time to now, which orders the entries by their use."""
    if time.time() - os.fstat(file.fileno()).st_mtime > USED_S:
        try:
            os.utime(file.fileno())
        except OSError as error:  # a cache that others own
            log.debug("cache: cannot record the use of an entry: %s", error)
