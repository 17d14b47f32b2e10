"""A cache of image checks, so that files that did not change are neither read nor decoded again by a later command."""

import logging
import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import numpy as np

from refract.cache_folder import cache_folder
from refract.pipeline.data.manifest import Sample
from refract.pipeline.data.storage import is_at_hand, scheme_of, state_of
from refract.pipeline.files import locked

log = logging.getLogger(__name__)

HASH = 16
"""Bytes of a `difference_hash`."""

RECORD = np.dtype([("digest", np.uint8, 32), ("difference", np.uint8, 1 + HASH)])
"""The check of one image: its SHA-256, then 1 and its `difference_hash`, or zeros for an image without one."""

FORMAT = 1
DECODERS = ("refract", "numpy", "opencv-python-headless", "pillow", "pillow-heif", "simplejpeg", "turbojpeg")
"""Packages whose version, or absence, may change a record."""

LIMIT = 2 << 30
"""Bytes of the cache, about 12 million files. A larger cache is removed when it is opened."""

TIMEOUT_S = 30.0
"""Seconds to wait for another process that writes."""

ROWS = 5_000
"""Rows that are written, or looked up, at once."""


class ScanCache:
    """Checks of files by their path and their `refract.pipeline.data.storage.State`.

    The cache is one SQLite file in `cache_folder()`, which several processes may use. If it cannot be used, all files are checked, and the
    reason is logged for `--verbose`. Of the ranks that torchrun starts on a machine, one checks the images, and the others wait and use its
    checks.
    """

    _database: sqlite3.Connection | None = None
    _versions = 0  # those of DECODERS, as one number

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or cache_folder() / "checks.sqlite"
        self._added: list[tuple[object, ...]] = []
        self._turn = ExitStack()  # holds the ranks' lock

    def __enter__(self) -> Self:
        for _ in range(2):
            try:
                if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
                    self._wait()
                self._database = self._opened()
                break
            except (sqlite3.Error, OSError) as error:
                self._disable(error)
                if type(error) is not sqlite3.DatabaseError:  # such an error removes the damaged file
                    break
        return self

    def __exit__(self, *_: object) -> None:
        self._store()
        if self._database is not None:
            self._database.close()
        self._turn.close()

    def states(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return int64 N×4, the state of each sample's file; zeros for an image without a file, or whose file has no state."""
        states = np.zeros((len(samples), 4), np.int64)
        if self._database is None:
            return states
        for row, sample in zip(states, samples, strict=True):
            if sample.data is None and (state := state_of(sample.path)) is not None:
                row[:] = state
        if not states.any():  # no check is stored, as of images in tables: the ranks work at the same time
            self._turn.close()
        return states

    def known(self, samples: Sequence[Sample], states: np.ndarray) -> Iterator[tuple[int, bytes, str]]:
        """Yield (row, the bytes of its RECORD, remark or "") for the samples whose file has the state of a stored check.

        A file that is not on this machine is checked again, as it may be unreadable.
        """
        rows = np.flatnonzero(states.any(axis=1)).tolist()
        for start in range(0, len(rows), ROWS):
            row_of = {_key(samples[row].path): row for row in rows[start : start + ROWS]}
            for path, *state, record, remark in self._rows(list(row_of)):
                row = row_of[path]
                same = state == states[row].tolist() and len(record) == RECORD.itemsize
                if same and is_at_hand(samples[row].path):
                    yield row, record, remark

    def add(self, path: str, state: np.ndarray, record: bytes, remark: str) -> None:
        """Store a check. state: of `states`, taken before the file was read."""
        if self._database is not None and state.any():
            self._added.append((_key(path), *state.tolist(), record, remark))
            if len(self._added) == ROWS:
                self._store()

    def _wait(self) -> None:
        """Wait for the lock of the ranks. The lock of a rank that died is free."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # a network file system may have no locks
            self._turn.enter_context(locked(self.file.with_suffix(".lock")))

    def _opened(self) -> sqlite3.Connection:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists() and self.file.stat().st_size > LIMIT:
            self.file.unlink()
        database = sqlite3.connect(self.file, timeout=TIMEOUT_S)
        self._versions = zlib.crc32(repr((FORMAT, [_version(package) for package in DECODERS])).encode()) >> 1
        with database:
            database.execute("BEGIN IMMEDIATE")
            if database.execute("PRAGMA user_version").fetchone() != (self._versions,):
                database.execute("DROP TABLE IF EXISTS checks")
                database.execute(
                    "CREATE TABLE checks (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER, ctime INTEGER, inode INTEGER, "
                    "record BLOB, remark TEXT) WITHOUT ROWID"
                )
                database.execute(f"PRAGMA user_version = {self._versions}")
        return database

    def _rows(self, paths: list[bytes]) -> list[tuple[Any, ...]]:
        if self._database is None:
            return []
        try:
            marks = ",".join("?" * len(paths))
            self._check_version(self._database)
            return self._database.execute(f"SELECT * FROM checks WHERE path IN ({marks})", paths).fetchall()
        except sqlite3.Error as error:
            self._disable(error)
            return []

    def _store(self) -> None:
        if self._database is not None and self._added:
            try:
                with self._database:
                    self._database.execute("BEGIN IMMEDIATE")
                    self._check_version(self._database)
                    self._database.executemany("REPLACE INTO checks VALUES (?,?,?,?,?,?,?)", self._added)
            except (sqlite3.Error, OSError) as error:
                self._disable(error)
        self._added.clear()

    def _check_version(self, database: sqlite3.Connection) -> None:
        """Raise OperationalError if a process with other versions of the packages has replaced the checks meanwhile."""
        if database.execute("PRAGMA user_version").fetchone() != (self._versions,):
            raise sqlite3.OperationalError("a process with other versions of Refract's packages uses it")

    def _disable(self, error: Exception) -> None:
        log.debug("%s cannot be used, so every image is checked again: %s", self.file, error)
        if self._database is not None:
            self._database.close()
        self._database = None
        self._turn.close()  # the other ranks need not wait for checks that they do not get
        if type(error) is sqlite3.DatabaseError:
            with suppress(OSError):  # the folder may be read-only
                self.file.unlink(missing_ok=True)  # damaged, or not a database


def _version(package: str) -> str:
    """Return the version of an installed package, else ""."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _key(path: str) -> bytes:
    """Return the path, absolute and otherwise as it is: `a/../b` may be another file than `b`, and another member of an archive."""
    return os.fsencode(path if scheme_of(path) else os.path.join(os.getcwd(), path))  # noqa: PTH118, PTH109 — Path is five times slower
