"""A review in progress: the queues, what each reviewer has not decided yet, and recording of decisions. Independent of HTTP."""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from refract.augment.decoding.formats import SUFFIXES
from refract.pipeline.files import write_atomically
from refract.pipeline.labels.decisions import LABELLING, Action, Decision, LabelError, Record
from refract.pipeline.review.data import ReviewData
from refract.pipeline.review.decisions import ORIGIN, Agreement, Audit, Decisions, agreement_of, audit_of
from refract.pipeline.review.images import HeatMaps, rendered
from refract.pipeline.review.items import Entry, Item, Queue
from refract.pipeline.review.queues import AUDIT, CONFLICTS, ranked

DISPUTED = Queue(CONFLICTS, "Conflicts", "Images on which reviewers decided differently. The last decision applies.")


@dataclass(frozen=True)
class ItemState:
    """The decisions on an item. applied: the one that applies, None without; conflicts: differing ones of other reviewers; seen: ID of
    the newest record, for `ReviewSession.decide`."""

    applied: Record | None
    conflicts: tuple[Record, ...]
    seen: int | None


@dataclass(frozen=True)
class Decided:
    """A decision of a reviewer. record: its ID; item: None for an image that this review does not show; queue: "" if not of a review."""

    record: int
    item: int | None
    action: Action
    labels: tuple[str, ...]
    queue: str


class ReviewSession:
    """The state of a review, shared by all reviewers. Methods may be called from several threads, and may wait for the database.

    The label history alone is stored: a session that starts again shows what is still open. LabelError for invalid input, IndexError for
    an unknown item, KeyError for an unknown queue.
    """

    def __init__(
        self, title: str, data: ReviewData, decisions: Decisions, *, heat_maps: HeatMaps | None = None,
        collected: Path | None = None,
    ) -> None:  # fmt: skip
        """title: the title of the page; collected: folder for copies of added images that a server captured, as its quota deletes them."""
        self.title, self._data, self._decisions, self._heat_maps = title, data, decisions, heat_maps
        self.items: Sequence[Item] = data.items
        self.multilabel = data.multilabel
        self.queues = (*ranked(data), DISPUTED)
        self._by_name = {queue.name: queue for queue in self.queues}
        self._contents = {
            queue.name: frozenset(self.items[entry.item].content for entry in queue.entries) for queue in self.queues
        }
        self._item_of = {item.content: item.index for item in data.items}
        self._collected = collected
        self._new_labels: set[str] = set()
        self._writing = threading.Lock()

    @property
    def labels(self) -> list[str]:
        """The known labels, sorted, with those that reviewers added."""
        return sorted({*self._data.labels, *self._new_labels})

    def ancestors(self, label: str) -> tuple[str, ...]:
        """Return the parent of a label in the class hierarchy, its parent and so on; nothing without one."""
        return self._data.ancestors(label)

    def refresh(self) -> None:
        """Take in the decisions of other processes."""
        self._decisions.refresh()

    def open_entries(self, queue: str, reviewer: str, *, start: int = 0, count: int = 20) -> list[Entry]:
        """Return `count` entries without a decision from the `start`-th one on, most urgent first.

        An entry is open if nobody decided on its image; in the audit, if this reviewer did not, so that reviewers can be compared.
        """
        return list(islice(self._open(queue, reviewer), start, start + count))

    def open_count(self, queue: str, reviewer: str) -> int:
        if queue == CONFLICTS:
            return sum(1 for _ in self._disputed())
        contents = self._contents[queue]
        closed = sum(one in contents and not self._is_open(queue, one, reviewer) for one in self._decisions.contents())
        return len(contents) - closed

    def _open(self, name: str, reviewer: str) -> Iterator[Entry]:
        if name == CONFLICTS:
            yield from self._disputed()
            return
        for entry in self._by_name[name].entries:
            if self._is_open(name, self.items[entry.item].content, reviewer):
                yield entry

    def _is_open(self, queue: str, content: str, reviewer: str) -> bool:
        if self._decisions.of_reviewer(content, reviewer) is not None:
            return False
        state = self._decisions.state(content)
        return state is None or self._audited(queue, state.applied)

    @staticmethod
    def _audited(queue: str, applied: Record) -> bool:
        """Whether the decision leaves the image open for a further reviewer: one of the audit does so in the audit."""
        return queue == AUDIT and applied.origin == ORIGIN + AUDIT

    def _disputed(self) -> Iterator[Entry]:
        for content in self._decisions.conflicts():
            state = self._decisions.state(content)
            if state is not None and content in self._item_of:
                said = [
                    (one.reviewer, ", ".join(one.labels) or one.action) for one in (*state.conflicts, state.applied)
                ]
                yield Entry(self._item_of[content], 0.0, "; ".join(f"{who}: {what}" for who, what in said) + ".")

    def neighbours(self, item: int, count: int = 5) -> list[tuple[int, float]]:
        """Return (item of the data set, cosine similarity of the embeddings), most similar first."""
        return self._data.nearest(self.items[item].index, count)

    def image(self, item: int, longest: int) -> bytes:
        """Return the image as a JPEG whose longer side has at most `longest` pixels. OSError or ImageError if it cannot be read."""
        return rendered(self.items[item].sample.read(), longest)

    def heat_map(self, item: int) -> tuple[bytes, str] | None:
        """Return (PNG of the network's input under its heat map for the most probable label, name of the method), None without evidence,
        or without a bundle. It takes about 70 forward passes; concurrent calls wait for each other."""
        if self._heat_maps is None:
            return None
        return self._heat_maps(self.items[item].sample.read())

    def given(self, item: int, queue: str) -> tuple[str, ...]:
        """Return the labels that a reviewer confirms in the queue: in the audit those before it, so that reviewers decide independently."""
        shown = self.items[item]
        return shown.labels if queue != AUDIT or shown.before_audit is None else shown.before_audit

    def in_data(self, item: int) -> bool:
        """Whether the data set has the image, so that its labels can be confirmed."""
        return self.items[item].index < self._data.labelled

    def state(self, item: int) -> ItemState:
        content = self.items[item].content
        state = self._decisions.state(content)
        applied, conflicts = (state.applied, state.conflicts) if state else (None, ())
        return ItemState(applied, conflicts, self._decisions.newest(content))

    def decide(
        self, item: int, *, action: Action, labels: Sequence[str], reviewer: str, queue: str, reason: str = "",
        seen: int | None = None,
    ) -> int:  # fmt: skip
        """Record a decision and return its ID. It is on disk when this returns. One that is sent again is recorded once.

        labels: all labels of the image, for `relabel` and `add`; `confirm` takes those of the item. seen: see `Decision`. LabelError for
        invalid labels, an unknown queue, and an action that does not fit the item.
        """
        shown = self.items[item]
        if queue not in self._by_name:
            raise LabelError(f"queue: {queue!r} is not one of {', '.join(self._by_name)}")
        action, labels = self._checked(shown, action, tuple(labels), self.given(item, queue))
        path = shown.path
        if action == "add" and (item in self._data.captured or shown.sample.data is not None):
            path = self._decisions.history.relative(self._collect(shown))
        decision = Decision(
            content=shown.content, path=path, action=action, labels=labels, reviewer=reviewer, reason=reason,
            origin=ORIGIN + queue, seen=seen,
        )  # fmt: skip
        with self._writing:
            self._decisions.refresh()
            if (repeated := self._decisions.repeated(decision)) is not None:
                return repeated.id
            if queue == AUDIT:  # whose reviewers do not see what others decided
                earlier_decision = self._decisions.of_reviewer(shown.content, reviewer)
                decision = replace(decision, seen=earlier_decision.id if earlier_decision else None)
            record = self._decisions.history.append(decision)
        self._new_labels.update(set(labels) - set(self._data.labels))
        self._decisions.refresh()
        return record

    def _checked(
        self, item: Item, action: Action, labels: tuple[str, ...], given: tuple[str, ...]
    ) -> tuple[Action, tuple[str, ...]]:
        in_data = self.in_data(item.index)
        if action == "undo":
            raise LabelError("action: undo takes the ID of a record; expected confirm, relabel, add, exclude or skip")
        if action == "relabel" and in_data and sorted(labels) == sorted(given):
            return "confirm", given  # so that the audit does not count it as a changed label
        if action == "confirm":
            if not in_data:
                raise LabelError("action: confirm needs an image with a label; this one has none, so choose a label")
            if labels and sorted(labels) != sorted(given):
                raise LabelError(f"labels: confirm takes the labels {', '.join(given)!r}; use relabel for others")
            return action, given
        if action == "relabel" and not in_data:
            action = "add"
        tree = self._data.hierarchy
        for label in labels:
            if tree is not None and label in tree.parents and label not in {*tree.labels, *self._data.labels}:
                raise LabelError(f"labels: {label!r} is a parent in the class hierarchy; choose one of its classes")
        if action in LABELLING and not self.multilabel and len(labels) != 1:
            raise LabelError(f"labels: expected one label, as each image has one; received {len(labels)}")
        return action, labels

    def _collect(self, item: Item) -> Path:
        """Write an image that a server's quota may delete, or that is not a file, to the folder of added images, and return the file."""
        if self._collected is None:
            raise LabelError("action: add copies this image to a folder; start the review with --collect FOLDER")
        data = item.sample.read()
        if hashlib.sha256(data).hexdigest() != item.content:
            raise LabelError(f"{item.path}: has changed since the review started; start it again")
        suffix = Path(item.sample.path).suffix
        file = self._collected / f"{item.content}{suffix if suffix.lower() in SUFFIXES else ''}"
        if not file.exists():
            self._collected.mkdir(parents=True, exist_ok=True)
            write_atomically(file, data)
        return file

    def undo(self, record: int, *, reviewer: str) -> None:
        """Undo a decision of the reviewer. LabelError for an unknown or undone record, or one of another reviewer."""
        known = next((one for one in self._decisions.latest(reviewer) if one.id == record), None)
        if known is None:
            raise LabelError(f"record: {record} is not a decision of {reviewer} that can be undone")
        with self._writing:
            self._decisions.history.undo(record, reviewer=reviewer, origin=known.origin)
        self._decisions.refresh()

    def decided(self, reviewer: str, count: int = 50) -> list[Decided]:
        """Return the reviewer's latest decisions that are not undone, the latest first."""
        return [
            Decided(one.id, self._item_of.get(one.content), one.action, one.labels, one.origin.removeprefix(ORIGIN))
            for one in islice(self._decisions.latest(reviewer), count)
        ]

    def audit(self) -> Audit | None:
        """Estimate the fraction of wrong labels among the images that no other queue settled, None before an audited image."""
        return audit_of(self._decisions.settled(), ORIGIN + AUDIT)

    def agreement(self) -> Agreement | None:
        """Compare the reviewers, None while no image has decisions of two."""
        return agreement_of(self._decisions.settled(), ORIGIN + CONFLICTS)
