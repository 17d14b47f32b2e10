"""The difference between two states of a label history, or between a data set and a state."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.labels.apply import listed_pairs
from refract.pipeline.labels.decisions import LabelError
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.labels.state import LabelState

EXCLUDED, ABSENT, SOURCE = "(excluded)", "(not in the data)", "(label of the data)"


@dataclass(frozen=True)
class ChangedImage:
    """An image whose labels differ. before, after: `a;b`, or one of EXCLUDED, ABSENT and SOURCE."""

    content: str
    path: str
    before: str
    after: str


@dataclass(frozen=True)
class Difference:
    """images: the images that differ, in the order of the decisions."""

    images: tuple[ChangedImage, ...]

    @property
    def pairs(self) -> Counter[tuple[str, str]]:
        """(before, after) → images."""
        return Counter((image.before, image.after) for image in self.images)

    def text(self) -> str:
        count = len(self.images)
        return f"{count:,} image{'s' * (count != 1)} differ{'s' * (count == 1)}" + (
            f": {listed_pairs(self.pairs)}" if self.images else ""
        )


def moment(history: LabelHistory, text: str) -> int:
    """Return the ID of the last decision at a moment: an ID itself, or the last one recorded by a time in ISO 8601, UTC by default.

    LabelError for another text, and for an ID after the newest one.
    """
    if text.isdecimal() and len(text) < 20:
        if int(text) and not history.decisions(since=int(text) - 1):
            raise LabelError(f"{history.address}: there is no decision {text}; a date has the form 2026-01-31")
        return int(text)
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise LabelError(f"{text!r} is neither the ID of a decision nor a time such as 2026-01-31T12:00") from error
    time = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
    return max((record.id for record in history.decisions() if record.recorded <= time), default=0)


def difference(
    before: LabelState, after: LabelState, data: Manifest | None = None, samples: Mapping[str, Sample] | None = None
) -> Difference:
    """Compare two states. data, samples: the data set and its content → sample, which name the labels of images without a decision."""
    return Difference(tuple(_changed(before, after, data, samples)))


def changed_by_decisions(before: LabelState, after: LabelState) -> list[ChangedImage]:
    """Return the images whose labels differ between two states of one history.

    The confirmation of an image without an earlier decision changes nothing: it repeats the label of the source.
    """
    return [
        image
        for image in difference(before, after).images
        if not any(
            SOURCE in (image.before, image.after) and _confirms(state, image.content) for state in (before, after)
        )
    ]


def _confirms(state: LabelState, content: str) -> bool:
    return content in state.images and state.images[content].applied.action == "confirm"


def _changed(
    before: LabelState, after: LabelState, data: Manifest | None, samples: Mapping[str, Sample] | None
) -> Iterator[ChangedImage]:
    states = {**before.images, **after.images}
    for content, one in sorted(states.items(), key=lambda item: item[1].applied.id):
        unchanged = SOURCE
        if data is not None and samples is not None:
            sample = samples.get(content)
            unchanged = ABSENT if sample is None else ";".join(sorted(data.labels[i] for i in sample.labels))
        old, new = (_labels(state, content, unchanged) for state in (before, after))
        if old != new:
            yield ChangedImage(content, one.applied.path, old, new)


def _labels(state: LabelState, content: str, unchanged: str) -> str:
    """Return the labels of an image in a state."""
    if content not in state.images:
        return unchanged
    one = state.images[content]
    included, labels = one.applied.effect
    if unchanged == ABSENT and one.added is None:
        return ABSENT  # a decision about an image that the data lacks has no effect
    return ";".join(labels) if included else ABSENT if unchanged == ABSENT else EXCLUDED
