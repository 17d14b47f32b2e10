"""The report's figures and thumbnails, as data addresses that an HTML file can carry."""

import base64
import io
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from augment import decode

THUMBNAIL = 96


def data_url(figure: object) -> str:
    """A matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)  # type: ignore[attr-defined]
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(data: bytes) -> str:
    """Encoded picture bytes as a JPEG of at most THUMBNAIL pixels a side; small ones are enlarged with their pixels left visible."""
    return _address(_small(data))


def pair_thumbnail(one: bytes, other: bytes) -> str:
    """Two pictures beside each other."""
    pictures = _small(one), _small(other)
    heights = [THUMBNAIL - picture.shape[0] for picture in pictures]
    padded = [
        cv2.copyMakeBorder(p, 0, more, 0, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        for p, more in zip(pictures, heights, strict=True)
    ]
    return _address(np.hstack(padded))


def _small(data: bytes) -> np.ndarray:
    pixels = decode(data)
    factor = THUMBNAIL / max(pixels.shape[:2])
    how = cv2.INTER_NEAREST if factor >= 2 else cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=how)


def _address(pixels: np.ndarray) -> str:
    coded = cv2.imencode(".jpg", pixels[:, :, ::-1])[1]
    return "data:image/jpeg;base64," + base64.b64encode(coded.tobytes()).decode()


def reliability_figure(bins: Sequence[tuple[float, float, int]]) -> str:
    """bins: see `pipeline.measures.reliability`."""
    axes = _axes("confidence", "share that is right", (4.2, 3.6))
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    confidence, right, counts = zip(*bins, strict=True)
    axes.plot(confidence, right, marker="o")
    for x, y, count in zip(confidence, right, counts, strict=True):
        axes.annotate(str(count), (x, y), textcoords="offset points", xytext=(4, -10), fontsize=7, color="0.4")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    return data_url(axes.figure)


def risk_figure(coverage: np.ndarray, risk: np.ndarray) -> str:
    axes = _axes("coverage: share that is answered", "risk: share of those that is wrong", (4.2, 3.6))
    places = np.unique(np.linspace(0, len(coverage) - 1, 400).astype(int))
    axes.plot(coverage[places], risk[places])
    axes.set(xlim=(0, 1), ylim=(0, None))
    return data_url(axes.figure)


def severity_figure(curve: Mapping[int, float]) -> str:
    """curve: see `Robustness.by_severity`."""
    axes = _axes("severity of the corruption", "accuracy", (4.2, 3.6))
    axes.plot(list(curve), [1 - error for error in curve.values()], marker="o")
    axes.set(ylim=(0, 1.02), xticks=list(curve))
    return data_url(axes.figure)


def noise_figure(errors: Mapping[int, float]) -> str:
    """errors: deviation of Gaussian noise in grey levels → share of wrong answers, 0 among them."""
    axes = _axes("deviation of Gaussian noise, grey levels of 255", "accuracy", (4.2, 3.6))
    axes.plot(list(errors), [1 - error for error in errors.values()], marker="o")
    axes.set(ylim=(0, 1.02), xticks=list(errors))
    return data_url(axes.figure)


def confusion_figure(confusion: np.ndarray, labels: Sequence[str]) -> str:
    from pipeline.plots import confusion_of

    return data_url(confusion_of(confusion, labels))


def _axes(x: str, y: str, size: tuple[float, float]):
    from matplotlib.figure import Figure

    axes = Figure(figsize=size, layout="constrained").add_subplot(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return axes
