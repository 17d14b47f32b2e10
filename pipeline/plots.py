"""The pictures that a run leaves for its reviewer: confusion matrix and learning curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def confusion_plot(confusion: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """`confusion_of` as a file."""
    confusion_of(confusion, labels).savefig(path, dpi=110)


def confusion_of(confusion: np.ndarray, labels: Sequence[str]) -> "Figure":
    """Rows the truth, columns the answer; the colour is the share of the row, the number the count (up to 30 classes)."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a label may have a dollar
        return _confusion(confusion, labels)


def _confusion(confusion: np.ndarray, labels: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure

    count = len(labels)
    side = min(14.0, 3 + 0.45 * count)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot(xlabel="answer", ylabel="truth")
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if count <= 60:
        axes.set_xticks(range(count), labels, rotation=90)
        axes.set_yticks(range(count), labels)
    if count <= 30:
        for (row, column), number in np.ndenumerate(confusion):
            if number:
                axes.text(
                    column,
                    row,
                    str(number),
                    ha="center",
                    va="center",
                    color="white" if shares[row, column] > 0.5 else "black",
                )
    return figure


def curves_plot(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """history: one mapping of metrics an epoch. Losses on the left, scores on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    names = [name for name in history[-1] if name.startswith(("train_", "val_"))] if history else []
    for place, part in enumerate(("loss", "score")):
        axes = figure.add_subplot(1, 2, place + 1, xlabel="epoch", title=part)
        for name in names:
            if name.endswith("_loss") == (part == "loss"):
                points = [(epoch + 1, row[name]) for epoch, row in enumerate(history) if name in row]
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    figure.savefig(path, dpi=110)
