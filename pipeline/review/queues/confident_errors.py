"""The bundle's most confident errors on images that it was not trained on."""

from refract.pipeline.review.data import ReviewData, listed, percent
from refract.pipeline.review.items import Entry


def confident_errors(data: ReviewData) -> tuple[Entry, ...] | None:
    """Rank the items of the data set whose label the bundle contradicts, by its confidence. None without a bundle's predictions."""
    if data.champion is None or data.multilabel:
        return None
    predictions = data.champion
    entries = [
        Entry(item, round(float(row.max()), 4), _reason(best, float(row.max()), data.items[item].labels))
        for item, row, best in zip(predictions.items, predictions.rows, predictions.best(), strict=True)
        if item < data.labelled and best not in data.items[item].labels
    ]
    return tuple(sorted(entries, key=lambda entry: -entry.score))


def _reason(predicted: str, confidence: float, labels: tuple[str, ...]) -> str:
    return f"The bundle predicts {predicted} ({percent(confidence)}), the label is {listed(labels)}."
