"""A cache of paraphrases: one SQLite file, keyed by the hashes of the texts. Independent of the method of paraphrasing.

`refract paraphrase` fills the file before training; the op `BackTranslation` reads it.
"""

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from refract.errors import InputError

VERSION = 2

# One transaction: a process killed during the script leaves an empty file, which the next process initialises.
_TABLES = f"""
BEGIN IMMEDIATE;
CREATE TABLE paraphrase (
    text BLOB NOT NULL, settings BLOB NOT NULL, number INTEGER NOT NULL, paraphrase TEXT NOT NULL, dropped TEXT,
    PRIMARY KEY (text, settings, number)
) WITHOUT ROWID;
CREATE TABLE run (settings BLOB PRIMARY KEY, way TEXT NOT NULL, number INTEGER NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {VERSION};
COMMIT;
"""


def digest(text: str) -> bytes:
    """Return a 16-byte hash of a text or of settings."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class CacheError(InputError):
    """A paraphrase cache cannot be read or written. The message names the file."""


class Cache:
    """A paraphrase cache opened for writing, by one process at a time. Any number of processes can read it concurrently."""

    def __init__(self, file: Path) -> None:
        """Open the file, or create it. Raises CacheError."""
        self.file = file
        try:
            self._connection = sqlite3.connect(file, timeout=30)
            if not self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                self._connection.executescript(_TABLES)
            _check(self._connection, file)
        except sqlite3.Error as error:
            raise CacheError(f"{file}: cannot be opened as a paraphrase cache ({error})") from error

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def start_run(self, settings: str, direction: str) -> None:
        """Register a run as the newest of its direction.

        `paraphrases` then returns the run's paraphrases of a text instead of those of older runs of the direction.
        direction: the languages, such as `en de`. Raises CacheError.
        """
        query = "INSERT OR REPLACE INTO run SELECT ?, ?, 1 + coalesce(max(number), 0) FROM run"
        self._write([(digest(settings), direction)], query)

    def missing(self, texts: Iterable[str], settings: str) -> list[str]:
        """Return the texts without an entry for these settings, without duplicates, in their order."""
        query = "SELECT DISTINCT text FROM paraphrase WHERE settings = ?"
        stored = {row[0] for row in self._connection.execute(query, (digest(settings),))}
        return [text for text in dict.fromkeys(texts) if digest(text) not in stored]

    def add(self, entries: Sequence[tuple[str, Sequence[tuple[str, str | None]]]], settings: str) -> None:
        """Store the paraphrases of each text in one transaction.

        entries: (text, [(paraphrase, reason for its rejection or None)]). Raises CacheError if the settings already have an entry for a
        text, or if the disk is full.
        """
        rows = [
            (digest(text), digest(settings), number, paraphrase, reason)
            for text, paraphrases in entries
            for number, (paraphrase, reason) in enumerate(paraphrases)
        ]
        self._write(rows, "INSERT INTO paraphrase VALUES (?, ?, ?, ?, ?)")

    def _write(self, rows: Sequence[tuple[object, ...]], query: str) -> None:
        try:
            with self._connection:
                self._connection.executemany(query, rows)
        except sqlite3.Error as error:
            raise CacheError(f"{self.file}: cannot write to the paraphrase cache ({error})") from error

    def dropped(self, texts: Iterable[str], settings: str) -> dict[str, int]:
        """Count the paraphrases of the texts by the reason for their rejection; the key "" counts the accepted ones."""
        counts: dict[str, int] = {}
        wanted = {digest(text) for text in texts}
        query = "SELECT text, dropped FROM paraphrase WHERE settings = ?"
        for text, reason in self._connection.execute(query, (digest(settings),)):
            if text in wanted:
                counts[reason or ""] = counts.get(reason or "", 0) + 1
        return counts


_NEWEST = """
SELECT run.number, way, paraphrase, dropped FROM paraphrase JOIN run USING (settings)
WHERE text = ? ORDER BY run.number, paraphrase.number
"""


def paraphrases(file: str, text: str) -> list[str]:
    """Return the accepted paraphrases of a text, in a fixed order; an empty list for an unknown text.

    For each direction, only the newest run counts that has an entry for the text, accepted or rejected. Raises CacheError.
    """
    try:
        rows = _reader(file).execute(_NEWEST, (digest(text),)).fetchall()
    except sqlite3.Error as error:
        raise CacheError(f"{file}: cannot read the paraphrase cache ({error})") from error
    newest = {direction: run for run, direction, *_ in rows}
    accepted = (new for run, direction, new, dropped in rows if run == newest[direction] and dropped is None)
    return list(dict.fromkeys(accepted))


def check_cache(file: str) -> None:
    """Raise CacheError unless the file is a readable paraphrase cache."""
    if not Path(file).is_file():
        raise CacheError(f"{file}: no such file; run `refract paraphrase MANIFEST --cache {file}` to create it")
    with _cache_errors(file), closing(_opened(file)) as connection:
        _check(connection, Path(file))


_thread = threading.local()


def _reader(file: str) -> sqlite3.Connection:
    """Return this thread's connection, opened once per thread and process; a forked process opens a new one."""
    connections: dict[tuple[int, str], sqlite3.Connection] = _thread.__dict__.setdefault("readers", {})
    key = (os.getpid(), file)
    if key not in connections:
        with _cache_errors(file):
            connections[key] = _opened(file)
    return connections[key]


def _opened(file: str) -> sqlite3.Connection:
    """Open the file for reading.

    The mode is `rw` because SQLite must first roll back the transaction of a killed writer. A file without write permission opens too.
    """
    connection = sqlite3.connect(f"{Path(file).absolute().as_uri()}?mode=rw", uri=True, timeout=30)
    connection.execute("PRAGMA query_only = ON")
    return connection


@contextmanager
def _cache_errors(file: str) -> Iterator[None]:
    """Convert errors of SQLite to CacheError."""
    try:
        yield
    except sqlite3.Error as error:
        interrupted = Path(f"{file}-journal").exists()
        hint = "; a killed process left a journal. Read the file once with write permission" if interrupted else ""
        raise CacheError(f"{file}: cannot be read as a paraphrase cache ({error}){hint}") from error


def _check(connection: sqlite3.Connection, file: Path) -> None:
    """Raise CacheError if the file has another format version."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != VERSION:
        raise CacheError(
            f"{file}: version {version} of the paraphrase cache is not supported; accepted: {VERSION}. "
            "Run `refract paraphrase` with another --cache"
        )
