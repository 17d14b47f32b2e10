"""The report's figures and thumbnails, as data addresses that an HTML file can carry."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from refract.augment import decode
from refract.pipeline.evaluation.plots import own_names, save, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THUMBNAIL = 96


def data_url(figure: "Figure") -> str:
    """A matplotlib figure as PNG."""
    buffer = io.BytesIO()
    save(figure, buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(data: bytes) -> str:
    """Encoded image bytes as a JPEG of at most THUMBNAIL pixels a side; small ones are enlarged with their pixels left visible."""
    return _address(_small(data))


def pair_thumbnail(one: bytes, other: bytes) -> str:
    """Two images beside each other."""
    images = _small(one), _small(other)
    heights = [THUMBNAIL - image.shape[0] for image in images]
    padded = [
        cv2.copyMakeBorder(p, 0, more, 0, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        for p, more in zip(images, heights, strict=True)
    ]
    return _address(np.hstack(padded))


def _small(data: bytes) -> np.ndarray:
    pixels = decode(data, color_profile="convert")  # the page is shown in sRGB
    factor = THUMBNAIL / max(pixels.shape[:2])
    how = cv2.INTER_NEAREST if factor >= 2 else cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=how)


def _address(pixels: np.ndarray) -> str:
    coded = cv2.imencode(".jpg", pixels[:, :, ::-1])[1]
    return "data:image/jpeg;base64," + base64.b64encode(coded.tobytes()).decode()


def reliability_chart(bins: Sequence[tuple[float, float, int]]) -> str:
    """bins: see `refract.pipeline.evaluation.measures.reliability`."""
    axes = _axes("confidence", "share that is right", (4.2, 3.6))
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    confidence, right, counts = zip(*bins, strict=True)
    axes.plot(confidence, right, marker="o")
    for x, y, count in zip(confidence, right, counts, strict=True):
        axes.annotate(str(count), (x, y), textcoords="offset points", xytext=(4, -10), fontsize=7, color="0.4")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    return data_url(axes.figure)


def risk_chart(coverage: np.ndarray, risk: np.ndarray) -> str:
    axes = _axes("coverage: share that is answered", "risk: share of those that is wrong", (4.2, 3.6))
    places = np.unique(np.linspace(0, len(coverage) - 1, 400).astype(int))
    axes.plot(coverage[places], risk[places])
    axes.set(xlim=(0, 1), ylim=(0, None))
    return data_url(axes.figure)


def severity_chart(curve: Mapping[int, float]) -> str:
    """curve: see `Robustness.by_severity`."""
    axes = _axes("severity of the corruption", "accuracy", (4.2, 3.6))
    axes.plot(list(curve), [1 - error for error in curve.values()], marker="o")
    axes.set(ylim=(0, 1.02), xticks=list(curve))
    return data_url(axes.figure)


def noise_chart(errors: Mapping[int, float]) -> str:
    """errors: deviation of Gaussian noise in grey levels → share of wrong answers, 0 among them."""
    axes = _axes("deviation of Gaussian noise, grey levels of 255", "accuracy", (4.2, 3.6))
    axes.plot(list(errors), [1 - error for error in errors.values()], marker="o")
    axes.set(ylim=(0, 1.02), xticks=list(errors))
    return data_url(axes.figure)


def two_histograms(reference: np.ndarray, new: np.ndarray, name: str) -> str:
    """Both as shares of their own, in bins that they have in common; what is no number is left out."""
    reference, new = (values[np.isfinite(values)] for values in (reference, new))
    axes = _axes(name, "share", (4.2, 3.0))
    edges = np.histogram_bin_edges(np.concatenate([reference, new]), bins=30)
    for values, label in ((reference, "reference"), (new, "new")):
        axes.hist(values, bins=edges, weights=np.full(len(values), 1 / max(1, len(values))), alpha=0.55, label=label)
    axes.legend(fontsize=8)
    return data_url(axes.figure)


def two_fractions(reference: np.ndarray, new: np.ndarray, labels: Sequence[str], most: int) -> str:
    """Two counts (C,) as shares, side by side, of the `most` labels that differ most."""
    shares = [counts / max(1, counts.sum()) for counts in (reference, new)]
    places = np.sort(np.argsort(-np.abs(shares[0] - shares[1]), kind="stable")[:most])
    with own_names():
        axes = _axes("", "share", (max(4.2, 0.45 * len(places)), 3.4))
        for side, values, label in ((-0.2, shares[0], "reference"), (0.2, shares[1], "new")):
            axes.bar(np.arange(len(places)) + side, values[places], 0.4, label=label)
        axes.set_xticks(range(len(places)))
        axes.set_xticklabels([short(labels[i]) for i in places], rotation=60, ha="right", fontsize=8)
        axes.legend(fontsize=8)
        return data_url(axes.figure)


def confusion_chart(confusion: np.ndarray, labels: Sequence[str]) -> str:
    from refract.pipeline.evaluation.plots import confusion_of

    return data_url(confusion_of(confusion, labels))


def _axes(x: str, y: str, size: tuple[float, float]):
    from matplotlib.figure import Figure

    axes = Figure(figsize=size, layout="constrained").add_subplot(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return axes
