"""The decisions of reviewers as a session sees them, in step with the label history that other processes extend."""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from refract.pipeline.labels.decisions import Decision, Record
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.labels.state import ImageState, state_of, undone_by

ORIGIN = "review/"
"""The start of the origin of a decision; the name of the queue follows."""

SETTLING = ("confirm", "relabel", "add", "exclude")

_COMPARED = ("action", "labels", "reason", "origin")


class Decisions:
    """The records of a label history by image, updated by each call of `refresh`. It may be used from several threads."""

    def __init__(self, history: LabelHistory) -> None:
        self.history, self._lock, self._last = history, threading.RLock(), 0
        self._records: dict[str, list[Record]] = defaultdict(list)
        self._by_reviewer: dict[str, list[Record]] = defaultdict(list)
        self._valid: dict[str, tuple[Record, ...]] = {}
        self._states: dict[str, ImageState] = {}
        self._settled: dict[str, tuple[Record, ...]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the records that were appended since the last call, also by other processes."""
        with self._lock:
            changed = set()
            for record in self.history.decisions(since=self._last):
                self._records[record.content].append(record)
                self._by_reviewer[record.reviewer].append(record)
                self._last = record.id
                changed.add(record.content)
            for content in changed:  # an undo has the content of the decision that it undoes
                self._update(content)

    def _update(self, content: str) -> None:
        records = self._records[content]
        undone = undone_by(records)
        self._valid[content] = tuple(one for one in records if one.id not in undone and one.action != "undo")
        self._settled[content] = tuple(one for one in self._valid[content] if one.action in SETTLING)
        state = state_of(records).images.get(content)
        if state is None:
            self._states.pop(content, None)
        else:
            self._states[content] = state

    def contents(self) -> list[str]:
        """Return the images with a record."""
        with self._lock:
            return list(self._records)

    def state(self, content: str) -> ImageState | None:
        return self._states.get(content)

    def newest(self, content: str) -> int | None:
        """Return the ID of the image's newest record, None without one."""
        records = self._records.get(content)
        return records[-1].id if records else None

    def conflicts(self) -> list[str]:
        """Return the images with a conflict, in the order of the decisions that apply."""
        with self._lock:
            disputed = [(state.applied.id, content) for content, state in self._states.items() if state.conflicts]
        return [content for _, content in sorted(disputed)]

    def of_reviewer(self, content: str, reviewer: str) -> Record | None:
        """Return the reviewer's last decision on the image, a skip included, that is not undone."""
        valid = self._valid.get(content, ())
        return next((record for record in reversed(valid) if record.reviewer == reviewer), None)

    def repeated(self, decision: Decision) -> Record | None:
        """Return the reviewer's last decision on the image if it is this one, and if the client has not seen its record.

        A client that saw no response sends a decision again, also after the review has been restarted.
        """
        last = self.of_reviewer(decision.content, decision.reviewer)
        if last is None or last.id <= (decision.seen or 0):
            return None
        return last if all(getattr(last, name) == getattr(decision, name) for name in _COMPARED) else None

    def latest(self, reviewer: str) -> Iterator[Record]:
        """Yield the reviewer's decisions of a review that are not undone, the latest first."""
        with self._lock:
            records = list(self._by_reviewer.get(reviewer, ()))
        for record in reversed(records):
            if record.origin.startswith(ORIGIN) and record in self._valid[record.content]:
                yield record

    def settled(self) -> list[tuple[Record, ...]]:
        """Return the decisions other than skips of each image, in the order of their IDs."""
        with self._lock:
            return [records for records in self._settled.values() if records]


@dataclass(frozen=True)
class Audit:
    """The random audit of the images that no other queue settled.

    decided: audited images with a decision; wrong: those whose label was changed or that were excluded; low, high: 95 % interval of the
    fraction of wrong labels (Wilson 1927), 0…1.
    """

    decided: int
    wrong: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        return self.wrong / self.decided


@dataclass(frozen=True)
class Agreement:
    """Images that two or more reviewers decided on, apart from decisions that settled a conflict. agreed: those on which the first two
    agree; kappa: Cohen's kappa of these decisions (Cohen 1960), None where it is undefined."""

    images: int
    agreed: int
    kappa: float | None


def audit_of(settled: Sequence[Sequence[Record]], origin: str) -> Audit | None:
    """Estimate the fraction of wrong labels from the images with a decision of this origin. The last decision on an image counts, also one
    that settled a conflict. None without such an image."""
    import numpy as np

    from refract.models.intervals import wilson

    audited = [records for records in settled if any(record.origin == origin for record in records)]
    if not audited:
        return None
    wrong = sum(_changed(records) for records in audited)
    low, high = wilson(np.array([wrong]), np.array([len(audited)]))[0].tolist()
    return Audit(len(audited), wrong, low, high)


def _changed(records: Sequence[Record]) -> bool:
    """Whether the last decision differs from the label before the first. A confirmed label may be one that an earlier decision set."""
    last = records[-1]
    return last.action != "confirm" or any(one.action != "confirm" and one.effect == last.effect for one in records)


def agreement_of(settled: Sequence[Sequence[Record]], settles_conflicts: str) -> Agreement | None:
    """Compare the last decisions of the first two reviewers of each image. None if no image has two.

    settles_conflicts: origin of decisions that do not count, as their reviewers saw what others had decided.
    """
    pairs = []
    for records in settled:
        last_of = {record.reviewer: record for record in records if record.origin != settles_conflicts}
        if len(last_of) > 1:
            first, second, *_ = last_of.values()
            pairs.append((_said(first), _said(second)))
    if not pairs:
        return None
    return Agreement(len(pairs), sum(first == second for first, second in pairs), _kappa(pairs))


def _said(record: Record) -> str:
    included, labels = record.effect
    return ";".join(labels) if included else "\0excluded"


def _kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    observed = sum(first == second for first, second in pairs) / len(pairs)
    firsts, seconds = (Counter(values) for values in zip(*pairs, strict=True))
    by_chance = sum(count * seconds[value] for value, count in firsts.items()) / len(pairs) ** 2
    return None if by_chance >= 1 else round((observed - by_chance) / (1 - by_chance), 4)
