"""The queues of a review: each ranks the images that are worth a look for one reason."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from refract.pipeline.review.data import ReviewData
from refract.pipeline.review.items import Entry, Queue
from refract.pipeline.review.queues.audit import audit
from refract.pipeline.review.queues.confident_errors import confident_errors
from refract.pipeline.review.queues.disagreements import disagreements
from refract.pipeline.review.queues.label_errors import label_errors
from refract.pipeline.review.queues.near_duplicates import near_duplicates
from refract.pipeline.review.queues.served import served
from refract.pipeline.review.queues.unlabelled import unlabelled

AUDIT, CONFLICTS = "audit", "conflicts"


class Kind(NamedTuple):
    """title, description: for the reviewer; rank: returns the entries, None if the review lacks what the queue needs."""

    title: str
    description: str
    rank: Callable[[ReviewData], tuple[Entry, ...] | None]


QUEUES: Mapping[str, Kind] = MappingProxyType(
    {
        "label-errors": Kind(
            "Likely label errors", "Labels that models trained on the other images contradict.", label_errors
        ),
        "near-duplicates": Kind(
            "Near-duplicates", "Copies and near-duplicates with different labels.", near_duplicates
        ),
        "served": Kind("Served images", "Images that a server was uncertain about, or that look unfamiliar.", served),
        "disagreements": Kind(
            "Disagreements", "Images for which the bundle and the challenger predict different labels.", disagreements
        ),
        "confident-errors": Kind(
            "Confident errors",
            "Validation and test images that the bundle gets wrong with confidence.",
            confident_errors,
        ),
        "unlabelled": Kind(
            "Unlabelled images", "A diverse batch of new images about which the model is unsure.", unlabelled
        ),
        AUDIT: Kind(
            "Random audit",
            "A random sample. It estimates how many labels are wrong, and how far reviewers agree.",
            audit,
        ),
    }
)
"""Name → queue, in the order in which the page shows them."""


def ranked(data: ReviewData) -> tuple[Queue, ...]:
    """Rank the images of a review, and return the queues for which it has the data."""
    queues = []
    for name, kind in QUEUES.items():
        if (entries := kind.rank(data)) is not None:
            queues.append(Queue(name, kind.title, kind.description, entries))
    return tuple(queues)
