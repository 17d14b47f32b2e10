"""The journal of a run: the entries for MLflow, one line of JSON each, written to disk before they are sent."""

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
    """The entries in order, and the number of delivered ones. An incomplete line, as after a kill, is dropped at opening.

    `delivered` is also stored on disk: `uri` of the server, `count` of delivered entries, and the server's results (`run_id`, …).
    """

    def __init__(self, run_dir: Path) -> None:
        """Open the journal. OSError if the folder cannot be read; ConfigError for a damaged line or a damaged file of `delivered`."""
        self.path, self._mark = run_dir / JOURNAL, run_dir / DELIVERED
        self.entries: list[Entry] = []
        self.delivered: dict[str, Any] = {"count": 0}
        self._lock = threading.Lock()
        if self.path.exists():
            data = self.path.read_bytes()
            complete = data[: data.rfind(b"\n") + 1]
            self.entries = [
                _entry(self.path, number, line) for number, line in enumerate(complete.splitlines(), start=1)
            ]
            if complete != data:
                os.truncate(self.path, len(complete))
        if self._mark.exists():
            self.delivered = _mark(self._mark, len(self.entries))

    def for_server(self, uri: str) -> None:
        """Deliver to this server from now on; a new server receives all entries. The address is stored `masked`."""
        uri = masked(uri)
        if self.delivered.get("uri", uri) != uri:
            self.delivered = {"count": 0}
        self.delivered["uri"] = uri

    def append(self, entry: Entry) -> None:
        """Write the entry to disk. OSError if that fails."""
        with self._lock, self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self.entries.append(entry)

    def waiting(self) -> list[Entry]:
        """Return the entries that are not delivered yet."""
        return self.entries[self.delivered["count"] :]

    def mark(self, **results: Any) -> None:
        """Record that the first waiting entry is delivered, and store the server's results."""
        self.delivered = {**self.delivered, **results, "count": self.delivered["count"] + 1}
        write_atomically(self._mark, json.dumps(self.delivered).encode())

    def keep(self, **results: Any) -> None:
        """Store the server's results for an entry that is already marked."""
        self.delivered = {**self.delivered, **results}
        write_atomically(self._mark, json.dumps(self.delivered).encode())

    def of(self, kind: str) -> Iterator[Entry]:
        """Return the entries of a kind, in order."""
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
            raise ValueError(f"count {count!r} of {entries} entries")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is damaged ({error}); remove it to deliver the run again") from error
    return delivered


def _entry(path: Path, number: int, line: bytes) -> Entry:
    try:
        entry: Entry = json.loads(line)
        entry["do"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}, line {number}: is damaged ({error}); remove the line to continue without it"
        ) from error
    return entry
