"""Decisions on the labels of images: what a reviewer, an import or delayed feedback says about one image."""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

from refract.errors import InputError, ServiceError
from refract.pipeline.data.sources.folders import trimmed_name

Action = Literal["confirm", "relabel", "add", "exclude", "skip", "undo"]
"""confirm, relabel and add set the labels; add also names the file of an image that the source may lack; exclude removes the image from
the data; skip records that the reviewer did not decide, and changes nothing; undo cancels the record that `undoes` names."""

ACTIONS: tuple[Action, ...] = get_args(Action)

LABELLING: tuple[Action, ...] = ("confirm", "relabel", "add")
"""Actions that set the labels of an image."""

LONGEST = 4000
"""The longest text of a decision, in characters."""


class LabelError(InputError):
    """Raised for an invalid decision, label database or file of labels; the message names the place and the remedy."""


class LabelDatabaseError(ServiceError):
    """Raised when the label database fails, such as a full disk or an unreachable server."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A decision on the labels of one image. LabelError for invalid values.

    content: SHA-256 of the image's bytes in hexadecimal, which identifies the image; path: where the image was, relative to the folder of
    the database or absolute; labels: all labels of the image for the actions in LABELLING, else empty; reviewer: name of the person or
    program; reason: free text; origin: where the decision comes from, such as review, import, feedback; time: the time of the decision,
    with a time zone, None for now.

    seen: ID of the newest record of this image that the reviewer knew, None for no record. Two reviewers who decide differently, one
    without having seen the other's decision, are in conflict.
    """

    content: str
    path: str
    action: Action
    reviewer: str
    labels: tuple[str, ...] = ()
    reason: str = ""
    origin: str = "review"
    seen: int | None = None
    time: datetime | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.content):
            raise LabelError(f"content: {self.content!r} is not a SHA-256 in hexadecimal (64 digits)")
        if self.action not in ACTIONS:
            raise LabelError(f"action: {self.action!r} is not one of {', '.join(ACTIONS)}")
        for name, text, needed in (
            ("path", self.path, True), ("reviewer", self.reviewer, True), ("origin", self.origin, True), ("reason", self.reason, False)
        ):  # fmt: skip
            _check_text(name, text, needed=needed)
        if self.labels and self.action not in (*LABELLING, "undo"):
            raise LabelError(f"labels: {self.action} takes none, got {';'.join(self.labels)!r}")
        for label in self.labels:
            check_label(label)
        if len(set(self.labels)) < len(self.labels):
            raise LabelError(f"labels: {';'.join(self.labels)!r} has a label twice")
        if self.time is not None and self.time.tzinfo is None:
            raise LabelError(f"time: {self.time.isoformat()} has no time zone; add one, such as +00:00")

    @property
    def effect(self) -> tuple[bool, tuple[str, ...]]:
        """What the decision says about the image: (whether it is in the data, its labels, sorted)."""
        return self.action != "exclude", tuple(sorted(self.labels))


@dataclass(frozen=True, kw_only=True)
class Record(Decision):
    """A decision in the database. id: its number, in the order of recording; recorded: when it was appended; undoes: ID of a record."""

    id: int
    recorded: datetime
    time: datetime
    undoes: int | None = None

    def __post_init__(self) -> None:
        """Check nothing: a decision is checked before it is recorded, and a history may have a million records."""


def check_label(label: str) -> None:
    """Raise LabelError for a text that is not a label: blank at an end, with `;` or NUL."""
    _check_text("labels", label, needed=True)
    if label != trimmed_name(label) or ";" in label:
        raise LabelError(f"labels: {label!r} is not a label; expected a name without ; and without spaces at its ends")


def _check_text(name: str, text: str, *, needed: bool) -> None:
    if needed and not text.strip():
        raise LabelError(f"{name}: is empty; expected a text")
    if len(text) > LONGEST:
        raise LabelError(f"{name}: has {len(text):,} characters; at most {LONGEST:,} are accepted")
    if "\0" in text or (not text.isascii() and text != text.encode("utf-8", "replace").decode()):
        raise LabelError(f"{name}: {text!r} is not UTF-8 text without NUL")
