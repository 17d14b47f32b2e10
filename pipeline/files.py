"""Files that are either whole or not there, and those that one process holds."""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Asked for once: the process's mask can only be read by setting it, which other threads would see.
_MASK = os.umask(0o077)
os.umask(_MASK)


def read_file(path: str | Path) -> bytes:
    """All of a regular file. OSError as usual, and for anything else: a pipe would be waited for, and a device has no end."""
    with open(path, "rb", buffering=0, opener=_opened_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.readall()


def _opened_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename over it: nobody sees half a file, and a failure leaves the old one. OSError as usual."""
    with written_atomically(path) as file:
        file.write(data)


@contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that gets its name `path` when the block ends; as `write_atomically` for what memory need not hold."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_MASK)  # mkstemp's own mode hides the file from everybody else
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        # The system does not say where a write to an open file failed. Errors without its number have a text of their own.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def locked(path: Path, otherwise: Exception) -> Iterator[None]:
    """Hold the file, which is made, for this process; one that died holds nothing. Raises `otherwise` where another process has it."""
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise otherwise from None
        yield
    finally:
        os.close(handle)
