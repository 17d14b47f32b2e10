"""The journal of a run: what MLflow shall know, a line of JSON each, on the disk before anything is sent."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refract.models.credentials import masked
from refract.pipeline.config.config import ConfigError
from refract.pipeline.files import write_atomically

JOURNAL, DELIVERED = "journal.jsonl", "journal.delivered.json"

Entry = dict[str, Any]


class Journal:
    """Entries in order, and how many of them the server has. A line that a kill cut short is dropped when the journal is opened.

    `delivered` is a mapping that outlives the process as well: `uri` of the server, `count` of the entries that it has, and what it
    answered (`run_id`, …).
    """

    def __init__(self, run_dir: Path) -> None:
        """OSError where the folder cannot be read; ConfigError for a line that is no entry, or a damaged mark."""
        self.path, self._mark = run_dir / JOURNAL, run_dir / DELIVERED
        self.entries: list[Entry] = []
        self.delivered: dict[str, Any] = {"count": 0}
        self._lock = threading.Lock()
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            self.entries = [_entry(self.path, number, line) for number, line in enumerate(whole.splitlines(), start=1)]
            if whole != data:
                os.truncate(self.path, len(whole))
        if self._mark.exists():
            self.delivered = _mark(self._mark, len(self.entries))

    def for_server(self, uri: str) -> None:
        """Deliver to this server from now on; one that has not had the run gets it from its beginning. The address is kept `masked`."""
        uri = masked(uri)
        if self.delivered.get("uri", uri) != uri:
            self.delivered = {"count": 0}
        self.delivered["uri"] = uri

    def append(self, entry: Entry) -> None:
        """Write the entry to the disk. OSError where it cannot be."""
        with self._lock, self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self.entries.append(entry)

    def waiting(self) -> list[Entry]:
        """Those that the server does not have yet."""
        return self.entries[self.delivered["count"] :]

    def mark(self, **answers: Any) -> None:
        """The first waiting entry is delivered; answers: to keep."""
        self.delivered = {**self.delivered, **answers, "count": self.delivered["count"] + 1}
        write_atomically(self._mark, json.dumps(self.delivered).encode())

    def keep(self, **answers: Any) -> None:
        """Keep answers to an entry that was marked before."""
        self.delivered = {**self.delivered, **answers}
        write_atomically(self._mark, json.dumps(self.delivered).encode())

    def of(self, kind: str) -> Iterator[Entry]:
        """The entries of a kind, in order."""
        return (entry for entry in self.entries if entry["do"] == kind)


def _mark(path: Path, entries: int) -> dict[str, Any]:
    try:
        delivered: dict[str, Any] = json.loads(path.read_text("utf-8"))
        count, uri = delivered["count"], delivered.get("uri", "")
        if (
            type(count) is not int
            or not 0 <= count <= entries
            or not isinstance(uri, str)
            or (count and "run_id" not in delivered)
        ):
            raise ValueError(f"it says that {count!r} of {entries} entries are delivered")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is damaged ({error}); remove it to deliver the run once more") from error
    return delivered


def _entry(path: Path, number: int, line: bytes) -> Entry:
    try:
        entry: Entry = json.loads(line)
        entry["do"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}, line {number}: is damaged ({error}); take the line out to go on without it"
        ) from error
    return entry
