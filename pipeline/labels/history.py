"""The label history: append decisions, undo them, and read them and their state."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from refract.pipeline.data.storage import scheme_of
from refract.pipeline.labels.database import Database
from refract.pipeline.labels.decisions import Decision, LabelError, Record
from refract.pipeline.labels.state import LabelState, state_of, undone_by

if TYPE_CHECKING:
    from sqlalchemy import Connection

_FIELDS = (
    "id", "recorded", "time", "content", "path", "action", "labels", "reviewer", "reason", "origin", "seen", "undoes"
)  # fmt: skip
_INSERT = f"INSERT INTO label_decisions ({', '.join(_FIELDS[1:])}) VALUES ({', '.join(f':{name}' for name in _FIELDS[1:])}) RETURNING id"
_SELECT = f"SELECT {', '.join(_FIELDS)} FROM label_decisions"


class LabelHistory:
    """The decisions on the labels of a data set, in an append-only database.

    Threads and processes may share the database. A decision is on disk when `append` returns its ID. IDs rise in the order in which
    decisions become visible, so that `decisions(since=…)` with the last known ID misses none. No record is ever changed or deleted:
    `undo` appends a further record. Images are identified by `Decision.content`; user files are never changed.

        history = LabelHistory("photos/labels.db", create=True)
        number = history.append(Decision(content=digest, path=history.relative(file), action="relabel", labels=("dog",), reviewer="ann"))
        history.state().images[digest].applied.labels     # ("dog",)
        history.undo(number, reviewer="ann", reason="it is a wolf")

    LabelError for invalid input; LabelDatabaseError when the database fails, for example after 30 s of waiting for other writers.
    """

    def __init__(self, address: str | Path, *, create: bool = False) -> None:
        """address: a file, or `postgresql://USER@HOST/DATABASE`; create: create the database if it does not exist."""
        self._database = Database(str(address), create=create)
        self.address = self._database.address
        """The address without a password."""

    def append(self, decision: Decision) -> int:
        """Record a decision and return its ID."""
        return self.extend([decision])[0]

    def extend(self, decisions: Iterable[Decision]) -> list[int]:
        """Record all decisions or, after an error, none. Returns their IDs."""
        with self._database.writing() as connection:
            return [_insert(connection, decision) for decision in decisions]

    def extend_with_new(self, decisions: Sequence[Decision]) -> list[int]:
        """Record the decisions that the history lacks, in one transaction. Returns their IDs.

        A decision with a time is known if a record has the same image, action, labels, reviewer and time. One without a time is known if
        the reviewer's last record of the image has the same action and labels. Undone records count: they are not restored.
        """
        with self._database.writing() as connection:
            records = _records(connection)
            known = {(*_said(record), record.time) for record in records}
            last = {(record.content, record.reviewer): _said(record) for record in records if record.action != "undo"}
            ids = []
            for decision in decisions:
                who, said = (decision.content, decision.reviewer), _said(decision)
                if (last.get(who) == said) if decision.time is None else ((*said, decision.time) in known):
                    continue
                ids.append(_insert(connection, decision))
                known.add((*said, decision.time))  # type: ignore[arg-type]
                last[who] = said
            return ids

    def undo(self, record: int, *, reviewer: str, reason: str = "", origin: str = "review") -> int:
        """Record that a decision, or an undo, no longer applies, and return the ID of the new record.

        LabelError if there is no such record, or if it is undone already.
        """
        with self._database.writing() as connection:
            records = {one.id: one for one in _records(connection)}
            if record not in records:
                raise LabelError(f"{self.address}: there is no decision {record}; `refract labels log` lists them")
            if by := undone_by(list(records.values())).get(record):
                raise LabelError(f"{self.address}: decision {record} is undone already, by decision {by}")
            one = records[record]
            undo = Decision(
                content=one.content, path=one.path, action="undo", labels=one.labels, reviewer=reviewer, reason=reason, origin=origin,
                seen=max(other.id for other in records.values() if other.content == one.content),
            )  # fmt: skip
            return _insert(connection, undo, undoes=record)

    def decisions(self, *, since: int = 0, until: int | None = None) -> list[Record]:
        """Return the records with since < ID ≤ until, in the order of their IDs."""
        with self._database.reading() as connection:
            return _records(connection, since=since, until=until)

    def state(self, *, until: int | None = None) -> LabelState:
        """Return what applies to each image, now or after the record `until`."""
        return state_of(self.decisions(until=until))

    def file(self, path: str) -> str:
        """Return the file of a decision's path: relative paths start at the folder of the database."""
        if self._database.folder is None or scheme_of(path):
            return path
        return str(self._database.folder / path)

    def relative(self, file: str | Path) -> str:
        """Return the path of a file for a decision: relative to the folder of the database if it is below it, else absolute."""
        if scheme_of(str(file)):
            return str(file)
        path, folder = Path(file).absolute(), self._database.folder
        return str(path.relative_to(folder)) if folder is not None and path.is_relative_to(folder) else str(path)


def _insert(connection: "Connection", decision: Decision, *, undoes: int | None = None) -> int:
    from sqlalchemy import text

    if (decision.action == "undo") != (undoes is not None):
        raise LabelError("action: undo is recorded by LabelHistory.undo")
    now = datetime.now(UTC)
    values = {
        "recorded": _written(now),
        "time": _written(decision.time or now),
        "content": decision.content,
        "path": decision.path,
        "action": decision.action,
        "labels": json.dumps(decision.labels, ensure_ascii=False),
        "reviewer": decision.reviewer,
        "reason": decision.reason,
        "origin": decision.origin,
        "seen": decision.seen,
        "undoes": undoes,
    }
    return int(connection.execute(text(_INSERT), values).scalar_one())


def _records(connection: "Connection", *, since: int = 0, until: int | None = None) -> list[Record]:
    from sqlalchemy import text

    end = "" if until is None else " AND id <= :until"
    rows = connection.execute(text(f"{_SELECT} WHERE id > :since{end} ORDER BY id"), {"since": since, "until": until})
    return [
        Record(
            id=row.id,
            recorded=datetime.fromisoformat(row.recorded),
            time=datetime.fromisoformat(row.time),
            content=row.content,
            path=row.path,
            action=row.action,
            labels=tuple(json.loads(row.labels)),
            reviewer=row.reviewer,
            reason=row.reason,
            origin=row.origin,
            seen=row.seen,
            undoes=row.undoes,
        )
        for row in rows
    ]


def _said(decision: Decision) -> tuple[str, str, tuple[str, ...], str]:
    return decision.content, decision.action, tuple(sorted(decision.labels)), decision.reviewer


def _written(time: datetime) -> str:
    """Return the time in UTC, in a form whose alphabetical order is that of the times."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")
