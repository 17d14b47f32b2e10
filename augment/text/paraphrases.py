"""Paraphrases that were made before training, kept in one SQLite file by the texts' hashes. Knows nothing of how they are made."""

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

VERSION = 2

# One transaction: killed in between, the file is as empty as before.
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
    """16 bytes that name a text, or settings."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class CacheError(ValueError):
    """The file is no cache of paraphrases, or cannot be used. The message names it."""


class Cache:
    """To be written by one process at a time, and read by any number, also meanwhile."""

    def __init__(self, file: Path) -> None:
        """Made where there is none. CacheError."""
        self.file = file
        try:
            self._connection = sqlite3.connect(file, timeout=30)
            if not self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                self._connection.executescript(_TABLES)
            _check(self._connection, file)
        except sqlite3.Error as error:
            raise CacheError(f"{file}: cannot be used as a cache of paraphrases ({error})") from error

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def start_run(self, settings: str, way: str) -> None:
        """A run with these settings: of the texts that have paraphrases by them, those of other settings and the same way are not drawn
        any more. way: what runs replace each other in, as the languages. CacheError."""
        query = "INSERT OR REPLACE INTO run SELECT ?, ?, 1 + coalesce(max(number), 0) FROM run"
        self._write([(digest(settings), way)], query)

    def missing(self, texts: Iterable[str], settings: str) -> list[str]:
        """Those of the texts, each once, in their order, that have not been translated with these settings."""
        own = digest(settings)
        rows = self._connection.execute("SELECT DISTINCT text FROM paraphrase WHERE settings = ?", (own,))
        known = {row[0] for row in rows}
        return [text for text in dict.fromkeys(texts) if digest(text) not in known]

    def add(self, found: Sequence[tuple[str, Sequence[tuple[str, str | None]]]], settings: str) -> None:
        """Keep, all or none, for each text its paraphrases, each with the reason for which it is not used, or None. CacheError where one
        is there already, or the disk is full."""
        rows = [
            (digest(text), digest(settings), number, paraphrase, reason)
            for text, paraphrases in found
            for number, (paraphrase, reason) in enumerate(paraphrases)
        ]
        self._write(rows, "INSERT INTO paraphrase VALUES (?, ?, ?, ?, ?)")

    def _write(self, rows: Sequence[tuple[object, ...]], query: str) -> None:
        try:
            with self._connection:
                self._connection.executemany(query, rows)
        except sqlite3.Error as error:
            raise CacheError(f"{self.file}: cannot be written ({error})") from error

    def dropped(self, texts: Iterable[str], settings: str) -> dict[str, int]:
        """Reason → how many paraphrases of the texts are not used for it; "" counts those that are."""
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
    """Those of a text that are used, in a fixed order: of each way, by the settings of the newest run that has any of the text, used or
    not. None for a text that was not translated. CacheError."""
    try:
        rows = _reader(file).execute(_NEWEST, (digest(text),)).fetchall()
    except sqlite3.Error as error:
        raise CacheError(f"{file}: cannot be read ({error})") from error
    newest = {way: run for run, way, *_ in rows}
    return list(dict.fromkeys(found for run, way, found, dropped in rows if run == newest[way] and dropped is None))


def check_cache(file: str) -> None:
    """CacheError where there is no cache to read from."""
    if not Path(file).is_file():
        raise CacheError(f"{file}: no such file; `refract paraphrase MANIFEST --cache {file}` makes it")
    with _told(file), closing(_opened(file)) as connection:
        _check(connection, Path(file))


_thread = threading.local()


def _reader(file: str) -> sqlite3.Connection:
    """This thread's own, opened once; a process that was forked from one that reads opens another."""
    open_ones: dict[tuple[int, str], sqlite3.Connection] = _thread.__dict__.setdefault("readers", {})
    key = (os.getpid(), file)
    if key not in open_ones:
        with _told(file):
            open_ones[key] = _opened(file)
    return open_ones[key]


def _opened(file: str) -> sqlite3.Connection:
    """For reading; `rw`, because what a killed process left half written has to be taken back first. A file that only may be read is
    opened all the same."""
    connection = sqlite3.connect(f"{Path(file).absolute().as_uri()}?mode=rw", uri=True, timeout=30)
    connection.execute("PRAGMA query_only = ON")
    return connection


@contextmanager
def _told(file: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        half = Path(f"{file}-journal").exists()
        hint = (
            "; a process was killed while it wrote, so it has to be read once where it can be written" if half else ""
        )
        raise CacheError(f"{file}: cannot be read as a cache of paraphrases ({error}){hint}") from error


def _check(connection: sqlite3.Connection, file: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != VERSION:
        raise CacheError(
            f"{file}: is no cache of paraphrases that this Refract reads (version {version}, not {VERSION}); "
            "`refract paraphrase` with another --cache makes a new one"
        )
