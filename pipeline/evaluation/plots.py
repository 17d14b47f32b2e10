"""The images that a run leaves for its reviewer: confusion matrix and learning curves."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

FONTS = (
    "DejaVu Sans", "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Noto Sans Arabic", "Noto Sans Hebrew",
    "Noto Sans Devanagari", "Noto Sans Thai", "WenQuanYi Zen Hei", "Arial Unicode MS", "Hiragino Sans", "Yu Gothic", "Malgun Gothic",
)  # fmt: skip
"""For labels in any writing: those that are installed, the first that has a letter."""


def save(figure: "Figure", target: Any, **options: Any) -> None:
    """As `figure.savefig`. Letters that no font here has are boxes then, which is told in a line, once."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figure.savefig(target, dpi=110, **options)
    for one in told:
        if "missing from font" in str(one.message):
            _tell_boxes()
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


@cache
def _tell_boxes() -> None:
    log.warning(
        "charts show boxes for letters of labels that no font here has; install one, as Debian's fonts-noto-cjk"
    )


LONGEST_LABEL = 28
"""Characters of a label in a chart: longer ones would take the chart's own place."""


def short(label: str) -> str:
    """The label as charts show it: its beginning and its end where it is long, so that labels with one beginning differ."""
    if len(label) <= LONGEST_LABEL:
        return label
    half = (LONGEST_LABEL - 1) // 2
    return f"{label[:half]}…{label[-half:]}"


@contextmanager
def own_names() -> Iterator[None]:
    """For text that is the user's: a dollar begins no formula, and any writing is drawn for which a font is here."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False, "font.family": _fonts()}):
        yield


@cache
def _fonts() -> list[str]:
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {font.fname for font in fontManager.ttflist}
    for file in findSystemFonts():  # matplotlib keeps a list, and does not look for what was installed since
        if file not in known:
            with suppress(OSError, RuntimeError):  # of a kind that it cannot draw
                fontManager.addfont(file)
    there = {font.name for font in fontManager.ttflist}
    return [name for name in FONTS if name in there]


def confusion_plot(confusion: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """`confusion_of` as a file."""
    save(confusion_of(confusion, labels), path)


def confusion_of(confusion: np.ndarray, labels: Sequence[str]) -> "Figure":
    """Rows the truth, columns the answer; the colour is the share of the row, the number the count (up to 30 classes)."""
    with own_names():
        return _confusion(confusion, labels)


def _confusion(confusion: np.ndarray, labels: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure

    count = len(labels)
    side = min(14.0, 3 + 0.45 * count + 0.05 * max((len(short(label)) for label in labels), default=0))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot(xlabel="answer", ylabel="truth")
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if count <= 60:
        shown = [short(label) for label in labels]
        axes.set_xticks(range(count), shown, rotation=90)
        axes.set_yticks(range(count), shown)
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
    save(figure, path)
