"""The charts of a run: confusion matrix and learning curves."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refract.pipeline.evaluation.confusion import DENSE
from refract.pipeline.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from refract.pipeline.evaluation.confusion import Confusion

log = logging.getLogger(__name__)

FONTS = (
    "DejaVu Sans", "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Noto Sans Arabic", "Noto Sans Hebrew",
    "Noto Sans Devanagari", "Noto Sans Thai", "WenQuanYi Zen Hei", "Arial Unicode MS", "Hiragino Sans", "Yu Gothic", "Malgun Gothic",
)  # fmt: skip
"""Fonts for labels in any script. Matplotlib takes each letter from the first installed font that has it."""


DPI = 110
"""Pixels per inch of the charts."""


def save(figure: "Figure", path: Path) -> None:
    """Write a figure atomically, in the format of the path's suffix. ValueError for a format that Matplotlib does not write, OSError."""
    write_atomically(path, drawn(figure, path.suffix.removeprefix(".") or "png"))


def drawn(figure: "Figure", kind: str = "png") -> bytes:
    """Lay the figure out and draw it, and log one warning per process if letters are missing from all installed fonts."""
    import matplotlib

    with (
        warnings.catch_warnings(record=True) as caught,
        # Without an engine, a figure takes the one of the user's matplotlibrc.
        matplotlib.rc_context({"figure.autolayout": False, "figure.constrained_layout.use": False}),
    ):
        warnings.simplefilter("always")
        figure.set_dpi(DPI)
        if (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
            figure.set_layout_engine(None)  # with an engine, savefig draws the whole figure twice
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=DPI, format=kind)
    for warning in caught:
        if "missing from font" in str(warning.message):
            _warn_missing_letters()
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return buffer.getvalue()


@cache
def _warn_missing_letters() -> None:
    log.warning(
        "charts show boxes for letters that no installed font has; install a font, such as Debian's fonts-noto-cjk"
    )


LONGEST_LABEL = 28
"""Characters of a label in a chart. Longer labels would squeeze the chart."""


def short(label: str) -> str:
    """Shorten a long label in its middle, so that labels with a common prefix stay distinct."""
    if len(label) <= LONGEST_LABEL:
        return label
    half = (LONGEST_LABEL - 1) // 2
    return f"{label[:half]}…{label[-half:]}"


@contextmanager
def literal_text() -> Iterator[None]:
    """Draw the user's text literally: a dollar sign starts no formula, and all installed fonts of FONTS are used."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False, "font.family": _fonts()}):
        yield


@cache
def _fonts() -> list[str]:
    from matplotlib.font_manager import findSystemFonts, fontManager

    cached = {font.fname for font in fontManager.ttflist}
    for file in findSystemFonts():  # matplotlib's cached list lacks fonts that were installed later
        if file not in cached:
            with suppress(OSError, RuntimeError):  # a font format that matplotlib cannot draw
                fontManager.addfont(file)
    installed = {font.name for font in fontManager.ttflist}
    return [name for name in FONTS if name in installed]


ERRORS = 40
"""Bars in the chart of the most frequent errors."""


def confusion_of(confusion: "Confusion", labels: Sequence[str]) -> "Figure":
    """Plot a confusion matrix: rows are true classes, columns predictions, colours fractions of the row.

    Up to 60 classes get labels on the axes, up to 30 get counts in the cells. For more than `confusion.DENSE` classes, whose cells would
    be smaller than a pixel, plot the most frequent errors.
    """
    with literal_text():
        return (_matrix if confusion.classes <= DENSE else _errors)(confusion, labels)


def _errors(confusion: "Confusion", labels: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    errors = confusion.most_frequent_errors(ERRORS)[::-1]
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(errors)), layout="constrained")
    axes = figure.add_subplot(xlabel="test samples", title="the most frequent errors: true label → predicted label")
    axes.barh(range(len(errors)), [count for _, _, count in errors])
    axes.set_yticks(
        range(len(errors)), [f"{short(labels[true])} → {short(labels[predicted])}" for true, predicted, _ in errors]
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _matrix(confusion: "Confusion", labels: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure

    count = len(labels)
    side = min(14.0, 3 + 0.45 * count + 0.05 * max((len(short(label)) for label in labels), default=0))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted label", ylabel="true label")
    axes.set_title("color: fraction of the true label", fontsize=9)
    matrix = confusion.matrix
    fractions = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    if count <= 60:
        shown = [short(label) for label in labels]
        axes.set_xticks(range(count), shown, rotation=90)
        axes.set_yticks(range(count), shown)
    if count <= 30:
        for (row, column), number in np.ndenumerate(matrix):
            if number:
                axes.text(
                    column,
                    row,
                    str(number),
                    ha="center",
                    va="center",
                    color="white" if fractions[row, column] > 0.5 else "black",
                )
    return figure


def curves_plot(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot losses on the left and scores on the right, over the epochs. history: the metrics of each epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    names = [name for name in history[-1] if name.startswith(("train_", "val_"))] if history else []
    for index, kind in enumerate(("loss", "score")):
        axes = figure.add_subplot(1, 2, index + 1, xlabel="epoch", ylabel=kind, title=f"{kind} of each epoch")
        for name in names:
            if name.endswith("_loss") == (kind == "loss"):
                points = [(epoch + 1, row[name]) for epoch, row in enumerate(history) if name in row]
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    save(figure, path)
