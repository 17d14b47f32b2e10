"""The label history: append decisions, undo them, and read them and their state."""

import json
from collections.abc import Iterable, Mapping, Sequence
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
_INSERT = (
    f"INSERT INTO label_decisions ({', '.join(_FIELDS[1:])}) VALUES ({', '.join(f':{name}' for name in _FIELDS[1:])})"
)
_SELECT = f"SELECT {', '.join(_FIELDS)} FROM label_decisions"
_LARGEST = 2**63 - 1
"""The largest ID of a database."""


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
        decisions = list(decisions)  # before the lock, for which others wait
        with self._database.writing() as connection:
            return _insert(connection, [_row(decision) for decision in decisions])

    def extend_with_new(self, decisions: Sequence[Decision]) -> list[int]:
        """Record the decisions that the history lacks, in one transaction. Returns their IDs.

        A decision with a time is known if a record has the same image, action, labels, reviewer and time. One without a time is known if
        the reviewer's last record of the image has the same action and labels. Undone records count: they are not restored.
        """
        with self._database.writing() as connection:
            records = _records(connection)
            known = {(*_said(record), record.time) for record in records}
            last = {(record.content, record.reviewer): _said(record) for record in records if record.action != "undo"}
            rows = []
            for decision in decisions:
                who, said = (decision.content, decision.reviewer), _said(decision)
                if (last.get(who) == said) if decision.time is None else ((*said, decision.time) in known):
                    continue
                rows.append(_row(decision))
                known.add((*said, decision.time))  # type: ignore[arg-type]
                last[who] = said
            return _insert(connection, rows)

    def undo(self, record: int, *, reviewer: str, reason: str = "", origin: str = "review") -> int:
        """Record that a decision, or an undo, no longer applies, and return the ID of the new record.

        LabelError if there is no such record, or if it is undone already.
        """
        return self.undo_all([record], reviewer=reviewer, reason=reason, origin=origin)[0]

    def undo_all(self, numbers: Iterable[int], *, reviewer: str, reason: str = "", origin: str = "review") -> list[int]:
        """Undo the records with these IDs, one after another, or, after an error, none. Returns the IDs of the new records."""
        with self._database.writing() as connection:
            records = {one.id: one for one in _records(connection)}
            undone = undone_by(list(records.values()))
            newest = {one.content: one.id for one in records.values()}
            ids = []
            for number in numbers:
                if number not in records:
                    raise LabelError(f"{self.address}: there is no decision {number}; `refract labels log` lists them")
                if by := undone.get(number):
                    raise LabelError(f"{self.address}: decision {number} is undone already, by decision {by}")
                one = records[number]
                undo = Decision(
                    content=one.content, path=one.path, action="undo", labels=one.labels, reviewer=reviewer, reason=reason,
                    origin=origin, seen=newest[one.content],
                )  # fmt: skip
                (undone[number],) = _insert(connection, [_row(undo, undoes=number)])
                newest[one.content] = undone[number]
                if one.undoes is not None:
                    del undone[one.undoes]  # it applies again
                ids.append(undone[number])
            return ids

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


def _row(decision: Decision, *, undoes: int | None = None) -> dict[str, object]:
    """Return the columns of a new record, but its ID."""
    if (decision.action == "undo") != (undoes is not None):
        raise LabelError("action: undo is recorded by LabelHistory.undo")
    now = datetime.now(UTC)
    return {
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


def _insert(connection: "Connection", rows: Sequence[Mapping[str, object]]) -> list[int]:
    """Append records in one statement, and return their IDs. No other process writes until the transaction ends."""
    from sqlalchemy import text

    if not rows:
        return []
    last = connection.execute(text("SELECT coalesce(max(id), 0) FROM label_decisions")).scalar_one()
    connection.execute(text(_INSERT), list(rows))
    ids = connection.execute(text("SELECT id FROM label_decisions WHERE id > :last ORDER BY id"), {"last": last})
    return list(ids.scalars())


def _records(connection: "Connection", *, since: int = 0, until: int | None = None) -> list[Record]:
    from sqlalchemy import text

    end = "" if until is None else " AND id <= :until"
    limits = {"since": min(since, _LARGEST), "until": None if until is None else min(until, _LARGEST)}
    rows = connection.execute(text(f"{_SELECT} WHERE id > :since{end} ORDER BY id"), limits)
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
