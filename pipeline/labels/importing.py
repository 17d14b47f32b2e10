"""Import a file of labels into a label history, and export the state of one."""

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.data.storage import sha256
from refract.pipeline.labels.apply import path_of
from refract.pipeline.labels.decisions import LABELLING, Action, Decision, LabelError
from refract.pipeline.labels.formats import format_of
from refract.pipeline.labels.formats.entry import Entry
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.labels.lookup import ImageLookup
from refract.pipeline.labels.state import LabelState

_LAST = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Imported:
    """recorded: IDs of the new decisions; known: number of decisions that the history has; unknown: place, name and reason of each image
    that was not found; unlabelled: place and name of each image without a decision in the file; replaced: place of each decision that a
    later one of the same file contradicts, and its place; older: a line for each recorded decision that applies in place of a later one."""

    recorded: Sequence[int]
    known: int
    unknown: Sequence[str]
    unlabelled: Sequence[str]
    replaced: Sequence[str] = ()
    older: Sequence[str] = ()


def import_labels(
    history: LabelHistory, file: Path, data: Manifest, *, reviewer: str, new_classes: bool = False
) -> Imported:
    """Record the decisions of a file in one transaction. An import of the same file again records nothing.

    data: the images that the file may name; reviewer: of decisions without one; new_classes: accept labels that neither the data nor the
    history has. LabelError or DataError names the place in the file; nothing is recorded then.
    """
    content = format_of(file).read(file)
    state = history.state()
    known_labels = {*data.labels, *state.labels()}
    if not new_classes:
        check_labels(((entry.where, label) for entry in content.entries for label in entry.labels), known_labels)
    added = [Sample(history.file(one.added.path), ()) for one in state.images.values() if one.added is not None]
    lookup = ImageLookup(data, added)
    decisions: list[tuple[str, Decision]] = []
    unknown = []
    # A time is that of the decision, and the last decision of a file applies.
    for entry in sorted(content.entries, key=lambda entry: entry.time or _LAST):
        try:
            path, digest = _image(entry, lookup, history)
        except _UnknownImageError as error:
            unknown.append(f"{entry.where}: {entry.name}: {error}")
            continue
        decisions.append((entry.where, _decision(entry, path, digest, reviewer)))
    last, replaced = _last_decisions(decisions)
    recorded = history.extend_with_new(last)
    older = _older(history, state, frozenset(recorded))
    return Imported(recorded, len(last) - len(recorded), unknown, content.unlabelled, replaced, older)


def _last_decisions(decisions: Sequence[tuple[str, Decision]]) -> tuple[list[Decision], list[str]]:
    """Return (the decisions without those that a later one replaces, a line for each of these if the two differ).

    decisions: (place, decision). Of the decisions of a reviewer on an image without a time, such as on two copies, the last one stays: a
    repeated import could not distinguish the others from new ones. Decisions with a time all stay.
    """
    last: dict[tuple[str, str, bool], tuple[str, Decision]] = {}
    for where, one in decisions:
        if one.time is None and (one.action != "skip" or _key(one) not in last):  # a skip changes nothing
            last[_key(one)] = where, one
    lasting, replaced = [], []
    for where, decision in decisions:
        place, final = last.get(_key(decision), (where, decision))
        if decision.time is not None or final is decision:
            lasting.append(decision)
        elif decision.action != "skip" and final.effect != decision.effect:
            replaced.append(f"{where}: {decision.path}: another decision on the same image follows: {place}")
    return lasting, replaced


def _older(history: LabelHistory, before: LabelState, recorded: frozenset[int]) -> list[str]:
    """Return a line for each recorded decision that was made before the one that applied in the state `before`, and differs from it."""
    lines = []
    for record in history.decisions(since=min(recorded) - 1) if recorded else ():
        image = before.images.get(record.content)
        if image is None or record.id not in recorded or record.action == "skip":
            continue
        if record.time < image.applied.time and record.effect != image.applied.effect:
            lines.append(
                f"decision {record.id}: {record.path}: applies in place of the later decision {image.applied.id}"
            )
    return lines


def _key(decision: Decision) -> tuple[str, str, bool]:
    """Return what a later decision shares with one that it replaces. An addition names a file, which a later relabel does not replace."""
    return decision.content, decision.reviewer, decision.action == "add"


def check_labels(labels: Iterable[tuple[str, str]], known: set[str]) -> None:
    """Raise LabelError for a label that is not known. labels: (its place, label)."""
    unknown = [(where, label) for where, label in labels if label not in known]
    if unknown:
        where, label = unknown[0]
        near = difflib.get_close_matches(label, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known labels: {', '.join(sorted(known)[:20]) or 'none'}"
        counts = Counter(label for _, label in unknown)
        more = f" ({len(counts)} such labels)" if len(counts) > 1 else ""
        raise LabelError(f"{where}: {label!r} is not a label of the data{more}{hint}; --new-classes accepts new labels")


class _UnknownImageError(Exception):
    """The image of an entry is not found. The message says why."""


def _image(entry: Entry, lookup: ImageLookup, history: LabelHistory) -> tuple[str, str]:
    """Return (path for the decision, SHA-256) of an entry's image."""
    sample = lookup.find(entry.name)
    try:
        if sample is not None:
            path, digest = path_of(history, sample), content_of(sample)
        elif entry.action == "add":
            path = history.relative(history.file(entry.name))
            digest = sha256(history.file(entry.name))
        elif entry.content:
            return entry.name, entry.content  # the image may have moved
        else:
            raise _UnknownImageError("no image of the data fits, or several do")
    except (OSError, ValueError) as error:  # ValueError for a name with a NUL
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise _UnknownImageError(f"cannot be read ({why})") from error
    if entry.content and digest != entry.content:
        raise _UnknownImageError("its bytes have changed")
    return path, digest


def content_of(sample: Sample) -> str:
    """Return the SHA-256 of a sample's image. OSError if it cannot be read."""
    return hashlib.sha256(sample.data).hexdigest() if sample.data is not None else sha256(sample.path)


def _decision(entry: Entry, path: str, digest: str, reviewer: str) -> Decision:
    labels = entry.labels if entry.action in LABELLING else ()
    try:
        return Decision(
            content=digest, path=path, action=entry.action, labels=labels, reviewer=entry.reviewer or reviewer, reason=entry.reason,
            origin=entry.origin, time=entry.time,
        )  # fmt: skip
    except LabelError as error:
        raise LabelError(f"{entry.where}: {error}") from error


def export_labels(history: LabelHistory, file: Path, *, prefix: str = "") -> int:
    """Write the decision that applies to each image, in the order of the decisions, and return the number that the format can express.

    prefix: text before each path, such as `/data/local-files/?d=`, with which an annotation tool finds the image.
    LabelError or OSError if the file cannot be written.
    """
    kind = format_of(file)
    states = sorted(history.state().images.values(), key=lambda one: one.applied.id)
    entries = []
    for one in states:
        decision = one.applied
        # An added image that was relabelled later is still to be added.
        action: Action = "add" if one.added is not None and decision.action in LABELLING else decision.action
        path = one.added.path if one.added is not None else decision.path
        entries.append(
            Entry(
                history.file(path), prefix + path, action, decision.labels, decision.reviewer, decision.time, decision.reason,
                decision.origin, decision.content,
            )
        )  # fmt: skip
    return kind.write(file, entries)


def contents_of(data: Manifest) -> Mapping[str, Sample]:
    """Return content → sample of a data set, whose images are all read. Images that cannot be read are skipped."""
    from refract.cores import mapped
    from refract.progress import tracked

    samples = [sample for sample in data.samples if sample.has_image]
    digests = list(tracked(mapped(_digest, samples), "reading images", len(samples)))
    return {digest: sample for digest, sample in zip(digests, samples, strict=True) if digest is not None}


def _digest(sample: Sample) -> str | None:
    try:
        return content_of(sample)
    except (OSError, ValueError):
        return None
