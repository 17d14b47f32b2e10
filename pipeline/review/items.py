"""What a review shows: items, queues of items with their reasons, and the state of a queue for one reviewer."""

from dataclasses import dataclass, field
from typing import NamedTuple

from refract.pipeline.data.manifest import Sample


class Prediction(NamedTuple):
    """A label with its probability, 0…1."""

    label: str
    probability: float


@dataclass(frozen=True)
class Item:
    """One image under review.

    index: its number in the session; content: SHA-256 of its bytes, in hexadecimal; sample: where its bytes are; path: for a decision, see
    `LabelHistory.relative`; labels: its labels when the review started, empty for an unlabelled image; split: the split of the data, empty
    for an image that is not in it; predictions: the most probable labels first; familiarity: 0…1, None if unknown; before_audit: its labels
    in the source if a decision of the audit applies, else None.
    """

    index: int
    content: str
    sample: Sample
    path: str
    labels: tuple[str, ...]
    split: str = ""
    predictions: tuple[Prediction, ...] = ()
    familiarity: float | None = None
    before_audit: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Entry:
    """An item in a queue. score: its rank's value, larger first; reason: why it is there, a sentence; related: index of another item that
    the reason names, such as the near-duplicate with a different label."""

    item: int
    score: float
    reason: str
    related: int | None = None


@dataclass(frozen=True)
class Queue:
    """Items worth a look. name: in URLs and in the origin of decisions; title, description: for the reviewer; entries: the most urgent
    first, each item once."""

    name: str
    title: str
    description: str
    entries: tuple[Entry, ...] = field(default=(), repr=False)
