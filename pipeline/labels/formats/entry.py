"""One decision of a file of labels, before its image is looked up."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from refract.pipeline.data.sources.folders import label_of, trimmed_name
from refract.pipeline.labels.decisions import ACTIONS, Action, LabelError


@dataclass(frozen=True)
class Entry:
    """A decision in a file.

    where: its place in the file, for messages; name: the image as the file names it, a path or an address; reviewer: "" if the file names
    none; content: SHA-256 of the image, "" if the file has none; the other fields as in `Decision`.
    """

    where: str
    name: str
    action: Action
    labels: tuple[str, ...] = ()
    reviewer: str = ""
    time: datetime | None = None
    reason: str = ""
    origin: str = "import"
    content: str = ""


@dataclass(frozen=True)
class LabelFile:
    """The content of a file of labels. unlabelled: the place and name of each image without a label or another decision."""

    entries: Sequence[Entry]
    unlabelled: Sequence[str] = ()


def label_names(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the labels in the form in which data sources have them: trimmed, in the Unicode form NFC, each once."""
    return tuple(dict.fromkeys(name for name in (label_of(trimmed_name(text)) for text in texts) if name))


def action_named(text: str, where: str) -> Action:
    """Return the action of a text. LabelError for an unknown one, and for undo, which only a database records."""
    accepted = [action for action in ACTIONS if action != "undo"]
    for action in accepted:
        if text == action:
            return action
    raise LabelError(f"{where}: action: {text!r} is not one of {', '.join(accepted)}")


def time_of(text: str, where: str) -> datetime | None:
    """Return the time of an ISO 8601 text in UTC, None for an empty one. LabelError without a time zone."""
    if not text.strip():
        return None
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise LabelError(
            f"{where}: time: {text!r} is not a time such as 2026-01-31T12:00:00+00:00; correct or remove it"
        ) from error
    if time.tzinfo is None:
        raise LabelError(f"{where}: time: {text!r} has no time zone; add one, such as +00:00")
    try:
        return time.astimezone(UTC)
    except OverflowError as error:
        raise LabelError(
            f"{where}: time: {text!r} is before the year 1 or after 9999 in UTC; correct or remove it"
        ) from error


def time_text(time: datetime | None) -> str:
    return "" if time is None else time.astimezone(UTC).isoformat(timespec="microseconds")
