"""The state of a label history: the decision that applies to each image, and conflicts between reviewers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from refract.pipeline.labels.decisions import Record


@dataclass(frozen=True)
class ImageState:
    """What applies to one image.

    applied: the last decision that is neither undone nor a skip; added: the last `add`, whose path names the image's file, None if the
    image was never added; conflicts: decisions of other reviewers that differ from `applied`, and that its reviewer had not seen.
    """

    applied: Record
    added: Record | None = None
    conflicts: tuple[Record, ...] = ()


@dataclass(frozen=True)
class LabelState:
    """images: content → what applies, for each image with a decision; last: ID of the newest record, 0 for none."""

    images: Mapping[str, ImageState]
    last: int

    def conflicts(self) -> list[ImageState]:
        """Return the images with a conflict, in the order of the decisions that apply."""
        return sorted((one for one in self.images.values() if one.conflicts), key=lambda one: one.applied.id)

    def labels(self) -> set[str]:
        """Return the labels that apply to any image."""
        return {label for one in self.images.values() for label in one.applied.labels}


def state_of(records: Iterable[Record]) -> LabelState:
    """Return the state after the records, which are in the order of their IDs."""
    records = list(records)
    undone = undone_by(records)
    by_content: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.id not in undone and record.action not in ("undo", "skip"):
            by_content[record.content].append(record)
    return LabelState(
        {content: _image_state(decisions) for content, decisions in by_content.items()},
        records[-1].id if records else 0,
    )


def undone_by(records: Sequence[Record]) -> dict[int, int]:
    """Return ID of each undone record → ID of the record that undoes it. An undo can be undone, too."""
    undone: dict[int, int] = {}
    for record in reversed(records):  # a record is older than its undo
        if record.undoes is not None and record.id not in undone:
            undone[record.undoes] = record.id
    return undone


def _image_state(decisions: Sequence[Record]) -> ImageState:
    applied = decisions[-1]
    last_of = {decision.reviewer: decision for decision in decisions}
    conflicts = (
        other
        for reviewer, other in last_of.items()
        if reviewer != applied.reviewer and other.effect != applied.effect and other.id > (applied.seen or 0)
    )
    added = next((decision for decision in reversed(decisions) if decision.action == "add"), None)
    return ImageState(applied, added, tuple(sorted(conflicts, key=lambda record: record.id)))
