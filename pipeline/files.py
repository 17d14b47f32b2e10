"""Read regular files, write files atomically, and lock files between processes."""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO

# Read once at import: reading the umask requires setting it, which would affect other threads.
_MASK = os.umask(0o077)
os.umask(_MASK)


def open_file(path: str | Path) -> FileIO:
    """Open a regular file for reading. Raises OSError on failure, and for pipes and devices, whose reads may not end."""
    file = open(path, "rb", buffering=0, opener=_opened_at_once)  # noqa: SIM115 — the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_file(path: str | Path) -> bytes:
    """Return the content of a regular file. Raises OSError as `open_file`."""
    with open_file(path) as file:
        return file.readall()


def _opened_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a temporary file next to `path`, then rename it: readers never see half a file; a failure keeps the old one.

    Raises OSError."""
    with written_atomically(path) as file:
        file.write(data)


@contextmanager
def written_atomically(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Yield a temporary file that is renamed to `path` at the end of the block: `write_atomically` for data that is streamed.

    sync: wait for the disk, so that a crash of the machine leaves no half file; without, readers must verify the content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        error.filename = str(path)  # not the temporary file, which no user knows
        raise
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_MASK)  # mkstemp denies access to all other users
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        # A failed write to an open file has no filename. An error without errno has a complete message.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def printable(path: str) -> str:
    """Return the path as valid UTF-8, with undecodable bytes as \\xNN."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@contextmanager
def locked(path: Path, otherwise: Exception | None = None) -> Iterator[int]:
    """Hold an exclusive lock on the file, which is created, during the block. Yields the file's descriptor.

    otherwise: is raised if another process holds the lock; None waits. The lock of a process that died is free. OSError.
    """
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if otherwise is None else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise otherwise or error from None
        try:
            yield handle
        finally:  # closing is not enough: a process that was forked meanwhile has the descriptor too
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)
