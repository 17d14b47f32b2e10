"""The label history: an append-only record that loses no decision, its state, undo and conflicts."""

import hashlib
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from refract.pipeline.labels.decisions import Decision, LabelDatabaseError, LabelError
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.labels.state import undone_by

FORK = multiprocessing.get_context("fork")


def content(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def decision(image: str, label: str, reviewer: str = "ann", **values: Any) -> Decision:
    return Decision(
        content=content(image), path=f"{image}.png", action="relabel", labels=(label,), reviewer=reviewer, **values
    )


@pytest.fixture
def history(tmp_path: Path) -> LabelHistory:
    return LabelHistory(tmp_path / "labels.db", create=True)


def applied(history: LabelHistory, image: str) -> tuple[str, ...]:
    return history.state().images[content(image)].applied.labels


def test_a_decision_is_stored_with_who_when_and_why(history: LabelHistory, tmp_path: Path) -> None:
    number = history.append(decision("x", "dog", reason="has a tail", origin="feedback", seen=3))
    (record,) = LabelHistory(tmp_path / "labels.db").decisions()
    assert (record.id, record.labels, record.reviewer, record.reason) == (number, ("dog",), "ann", "has a tail")
    assert (record.origin, record.seen, record.content, record.path) == ("feedback", 3, content("x"), "x.png")
    assert record.time == record.recorded and (datetime.now(UTC) - record.time).total_seconds() < 600
    assert record.time.utcoffset() is not None


def test_the_last_decision_that_is_not_undone_applies(history: LabelHistory) -> None:
    first, second = history.append(decision("x", "dog")), history.append(decision("x", "cat"))
    assert applied(history, "x") == ("cat",)
    undo = history.undo(second, reviewer="bob", reason="wrong")
    assert applied(history, "x") == ("dog",)
    redo = history.undo(undo, reviewer="bob")
    assert applied(history, "x") == ("cat",)
    assert applied_at(history, second) == ("cat",) and applied_at(history, first) == applied_at(history, undo) == (
        "dog",
    )
    with pytest.raises(LabelError, match=f"decision {undo} is undone already, by decision {redo}"):
        history.undo(undo, reviewer="bob")
    with pytest.raises(LabelError, match="no decision 99"):
        history.undo(99, reviewer="bob")
    assert undone_by(history.decisions()) == {undo: redo}
    assert [record.action for record in history.decisions(since=second)] == ["undo", "undo"]


def applied_at(history: LabelHistory, until: int) -> tuple[str, ...]:
    return history.state(until=until).images[content("x")].applied.labels


def test_a_skip_changes_nothing_and_undoing_the_only_decision_leaves_no_state(history: LabelHistory) -> None:
    number = history.append(decision("x", "dog"))
    history.append(Decision(content=content("x"), path="x.png", action="skip", reviewer="bob"))
    assert applied(history, "x") == ("dog",)
    history.undo(number, reviewer="ann")
    assert not history.state().images and history.state().last == 3


@pytest.mark.parametrize("statement", [
    "UPDATE label_decisions SET labels = '[]'",
    "DELETE FROM label_decisions",
    "INSERT OR REPLACE INTO label_decisions SELECT * FROM label_decisions",
])  # fmt: skip
def test_records_cannot_be_changed_or_deleted(history: LabelHistory, tmp_path: Path, statement: str) -> None:
    history.append(decision("x", "dog"))
    with closing(sqlite3.connect(tmp_path / "labels.db", isolation_level=None)) as database:
        with pytest.raises(sqlite3.IntegrityError, match="never changed or deleted"):
            database.execute(statement)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert applied(history, "x") == ("dog",)


def test_two_reviewers_who_did_not_see_each_other_are_in_conflict(history: LabelHistory) -> None:
    first = history.append(decision("x", "dog", "ann"))
    history.append(decision("y", "dog", "ann"))
    history.append(decision("y", "dog", "bob"))  # they agree
    assert not history.state().conflicts()
    second = history.append(decision("x", "cat", "bob"))
    (conflict,) = history.state().conflicts()
    assert conflict.applied.id == second and [one.id for one in conflict.conflicts] == [first]
    assert applied(history, "x") == ("cat",)
    history.append(decision("x", "dog", "ann", seen=second))
    assert not history.state().conflicts() and applied(history, "x") == ("dog",)


def test_a_correction_of_a_seen_decision_is_no_conflict_and_undo_can_end_one(history: LabelHistory) -> None:
    first = history.append(decision("x", "dog", "ann"))
    history.append(decision("x", "cat", "bob", seen=first))
    assert not history.state().conflicts()
    exclude = Decision(content=content("x"), path="x.png", action="exclude", reviewer="cyd", seen=first)
    number = history.append(exclude)
    assert [one.reviewer for one in history.state().conflicts()[0].conflicts] == ["bob"]
    history.undo(number, reviewer="cyd")
    assert not history.state().conflicts()


def test_decisions_that_are_known_are_not_recorded_again(history: LabelHistory) -> None:
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    dated, undated = decision("x", "dog", time=when), decision("y", "cat")
    assert history.extend_with_new([dated, undated, dated, undated]) == [1, 2]
    assert history.extend_with_new([dated, undated]) == []
    history.undo(1, reviewer="ann")
    assert history.extend_with_new([dated]) == []  # the undo stands
    history.append(decision("x", "cat"))
    assert history.extend_with_new([dated]) == []  # an old file restores nothing
    history.append(decision("y", "dog"))
    assert history.extend_with_new([undated]) == [6]  # ann changed her mind again
    assert history.extend_with_new([decision("y", "cat", "bob")]) == [7]  # bob agrees


def test_an_error_in_one_of_several_decisions_records_none(history: LabelHistory) -> None:
    def decisions() -> Iterable[Decision]:
        yield decision("x", "dog")
        raise LabelError("stop")

    with pytest.raises(LabelError, match="stop"):
        history.extend(decisions())
    assert history.decisions() == []


@pytest.mark.parametrize(("values", "message"), [
    ({"content": "abc"}, "content: 'abc' is not a SHA-256"),
    ({"action": "rename"}, "action: 'rename' is not one of confirm, relabel, add, exclude, skip, undo"),
    ({"labels": ("a;b",)}, "labels: 'a;b' is not a label"),
    ({"labels": (" a",)}, "labels: ' a' is not a label"),
    ({"labels": ("a", "a")}, "has a label twice"),
    ({"reviewer": " "}, "reviewer: is empty"),
    ({"action": "exclude"}, "labels: exclude takes none"),
    ({"reason": "r" * 5000}, "reason: has 5,000 characters"),
    ({"time": datetime(2026, 1, 1)}, "has no time zone"),
])  # fmt: skip
def test_invalid_decisions_are_named(values: dict[str, Any], message: str) -> None:
    valid: dict[str, Any] = {
        "content": content("x"),
        "path": "x.png",
        "action": "relabel",
        "labels": ("dog",),
        "reviewer": "ann",
    }
    with pytest.raises(LabelError, match=message):
        Decision(**(valid | values))


def test_other_files_are_refused_and_not_changed(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"labels.db: no such label database"):
        LabelHistory(tmp_path / "labels.db")
    with pytest.raises(LabelError, match="the folder .* does not exist"):
        LabelHistory(tmp_path / "nowhere" / "labels.db", create=True)
    (tmp_path / "text.db").write_text("path,label\n" * 1000)
    with pytest.raises(LabelError, match="is not a label database"):
        LabelHistory(tmp_path / "text.db", create=True)
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE runs (id)")
    with pytest.raises(LabelError, match="a database without a label history"):
        LabelHistory(tmp_path / "other.db", create=True)
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    with pytest.raises(LabelError, match="starts with postgresql://"):
        LabelHistory("mysql://host/x")
    with pytest.raises(LabelError, match=r"\*\*\*@host:port/x: is not an address"):
        LabelHistory("postgresql://ann:secret@host:port/x")
    with pytest.raises(LabelDatabaseError, match="postgresql://ann@127.0.0.1:1/labels: .*connection to server"):
        LabelHistory("postgresql://ann@127.0.0.1:1/labels")  # with the driver that Refract installs
    with pytest.raises(LabelError, match="the driver is unknown"):
        LabelHistory("postgresql+nosuch://host/x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.db", "text.db"]


def test_a_database_of_a_later_version_is_refused(history: LabelHistory, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "labels.db", isolation_level=None)) as database:
        database.execute("UPDATE label_schema SET version = 2")
    with pytest.raises(LabelError, match="have version 2; this Refract reads version 1"):
        LabelHistory(tmp_path / "labels.db")


def test_a_locked_database_is_reported(history: LabelHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refract.pipeline.labels.database.BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(tmp_path / "labels.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LabelDatabaseError, match=r"labels.db: the label database failed: database is locked"):
            history.append(decision("x", "dog"))
        assert history.decisions() == []  # reading waits for no writer


def test_processes_that_write_at_once_lose_no_decision(tmp_path: Path) -> None:
    def write(worker: int) -> None:
        label_history = LabelHistory(tmp_path / "labels.db", create=True)  # they also create it at once
        for number in range(10):
            label_history.append(decision(f"{worker}-{number}", "dog", f"reviewer {worker}"))

    processes = [FORK.Process(target=write, args=(worker,)) for worker in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    records = LabelHistory(tmp_path / "labels.db").decisions()
    assert [record.id for record in records] == list(range(1, 41))
    assert {record.content for record in records} == {content(f"{w}-{n}") for w in range(4) for n in range(10)}


def test_a_kill_loses_no_acknowledged_decision(tmp_path: Path) -> None:
    path, log = tmp_path / "labels.db", tmp_path / "acknowledged"

    def write(turn: int) -> None:
        label_history = LabelHistory(path, create=True)
        with log.open("a") as acknowledged:
            for number in range(100_000):
                image = f"{turn}-{number}"
                if number % 3:
                    label_history.append(decision(image, "dog"))
                else:
                    label_history.extend([decision(image, "dog"), decision(f"{image}b", "dog")])
                acknowledged.write(f"{image}\n")
                acknowledged.flush()

    log.touch()
    LabelHistory(tmp_path / "other.db", create=True)  # imports SQLAlchemy once, not in each process
    for turn in range(5):
        process = FORK.Process(target=write, args=(turn,))
        process.start()
        enough = len(log.read_text().split()) + 1 + turn
        while len(log.read_text().split()) < enough:
            time.sleep(0.001 * turn)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    stored = {record.content for record in LabelHistory(path, create=True).decisions()}
    known = log.read_text().split()
    assert {content(image) for image in known} <= stored
    pairs = [(f"{turn}-{n}", f"{turn}-{n}b") for turn in range(5) for n in range(0, 300, 3)]
    assert all((content(one) in stored) == (content(two) in stored) for one, two in pairs)  # both or none


def test_several_undos_are_recorded_together_or_not_at_all(history: LabelHistory) -> None:
    first, second = history.append(decision("x", "dog")), history.append(decision("x", "cat"))
    with pytest.raises(LabelError, match="no decision 99"):
        history.undo_all([second, 99], reviewer="bob")
    assert applied(history, "x") == ("cat",)
    undo, _ = history.undo_all([second, first], reviewer="bob")
    assert not history.state().images
    redo, again = history.undo_all([undo, second], reviewer="bob")  # the undo, then the decision that applies again
    assert undone_by(history.decisions()) == {undo: redo, second: again, first: undo + 1}


def test_creation_without_hard_links_replaces_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process creates the database and records a decision just before this one moves its own to the path."""

    def refused(*_: object) -> None:
        raise PermissionError

    def other_is_first(*_: object) -> None:
        monkeypatch.setattr(os, "link", refused)
        LabelHistory(tmp_path / "labels.db", create=True).append(decision("x", "dog"))
        raise PermissionError

    monkeypatch.setattr(os, "link", other_is_first)
    assert applied(LabelHistory(tmp_path / "labels.db", create=True), "x") == ("dog",)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.db"]


def test_a_symbolic_link_names_the_history_and_its_folder(history: LabelHistory, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "labels.db").symlink_to(tmp_path / "labels.db")
    linked = LabelHistory(tmp_path / "project" / "labels.db")
    linked.append(decision("x", "dog"))
    assert applied(history, "x") == ("dog",) and linked.file("new.png") == str(tmp_path / "new.png")
    (tmp_path / "loop.db").symlink_to(tmp_path / "loop.db")
    with pytest.raises(LabelDatabaseError, match="unable to open"):
        LabelHistory(tmp_path / "loop.db", create=True)


def test_numbers_beyond_those_of_a_database_are_accepted(history: LabelHistory) -> None:
    history.append(decision("x", "dog"))
    assert len(history.decisions(until=10**30)) == 1 and history.decisions(since=10**30) == []
