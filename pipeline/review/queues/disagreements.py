"""Images on which two bundles disagree, such as the champion and a challenger."""

import numpy as np

from refract.pipeline.review.data import ReviewData, percent
from refract.pipeline.review.items import Entry


def disagreements(data: ReviewData) -> tuple[Entry, ...] | None:
    """Rank the items for which the bundles predict different labels, the more confident both, the higher. None without two bundles."""
    first, second = data.champion, data.challenger
    if first is None or second is None or data.multilabel:
        return None
    row_of = {item: row for row, item in enumerate(second.items)}
    entries = []
    for row, (item, best) in enumerate(zip(first.items, first.best(), strict=True)):
        if (other := row_of.get(item)) is None:
            continue
        column = int(second.rows[other].argmax())
        if (label := second.labels[column]) == best:
            continue
        confidences = float(first.rows[row].max()), float(second.rows[other, column])
        reason = f"The bundle predicts {best} ({percent(confidences[0])}), the challenger {label} ({percent(confidences[1])})."
        entries.append(Entry(item, round(float(np.sqrt(np.prod(confidences))), 4), reason))
    return tuple(sorted(entries, key=lambda entry: -entry.score))
