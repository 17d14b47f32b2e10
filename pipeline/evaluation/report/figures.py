"""The report's charts and thumbnails, as data URLs that are embedded in the HTML file."""

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from refract.augment import decode
from refract.pipeline.evaluation.plots import drawn, literal_text, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THUMBNAIL = 96


def data_url(figure: "Figure") -> str:
    """Return a matplotlib chart as the data URL of a PNG."""
    return "data:image/png;base64," + base64.b64encode(drawn(figure)).decode()


def thumbnail(data: bytes) -> str:
    """Return encoded image bytes as the data URL of a JPEG with a longer side of THUMBNAIL pixels; small images keep sharp pixels."""
    return _address(_small(data))


def pair_thumbnail(left: bytes, right: bytes) -> str:
    """Return two images side by side as one thumbnail."""
    images = _small(left), _small(right)
    paddings = [THUMBNAIL - image.shape[0] for image in images]
    padded = [
        cv2.copyMakeBorder(image, 0, padding, 0, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        for image, padding in zip(images, paddings, strict=True)
    ]
    return _address(np.hstack(padded))


def small_jpeg(data: bytes, side: int) -> bytes:
    """Return encoded image bytes as a JPEG with a longer side of `side` pixels. ImageError for bytes that cannot be decoded."""
    return _jpeg(_small(data, side))


def _small(data: bytes, side: int = THUMBNAIL) -> np.ndarray:
    pixels = decode(data, color_profile="convert")  # the page is shown in sRGB
    factor = side / max(pixels.shape[:2])
    interpolation = cv2.INTER_NEAREST if factor >= 2 else cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=interpolation)


def _address(pixels: np.ndarray) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(_jpeg(pixels)).decode()


def _jpeg(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", pixels[:, :, ::-1])[1].tobytes()


def reliability_chart(bins: Sequence[tuple[float, float, int]]) -> str:
    """Plot the fraction of right predictions over the confidence. bins: see `refract.pipeline.evaluation.measures.reliability`."""
    axes = _axes("confidence (numbers: predictions)", "fraction of right predictions", (4.2, 3.6))
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    confidence, right, counts = zip(*bins, strict=True)
    axes.plot(confidence, right, marker="o")
    for x, y, count in zip(confidence, right, counts, strict=True):
        axes.annotate(str(count), (x, y), textcoords="offset points", xytext=(4, -10), fontsize=7, color="0.4")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    return data_url(axes.figure)


def risk_chart(coverage: np.ndarray, risk: np.ndarray) -> str:
    axes = _axes(
        "coverage: fraction of the images that is predicted", "risk: fraction of these that is wrong", (4.2, 3.6)
    )
    indices = np.unique(np.linspace(0, len(coverage) - 1, 400).astype(int))
    axes.plot(coverage[indices], risk[indices])
    axes.set(xlim=(0, 1), ylim=(0, None))
    return data_url(axes.figure)


def severity_chart(curve: Mapping[int, float]) -> str:
    """Plot the accuracy over the corruption severity. curve: see `Robustness.by_severity`."""
    axes = _axes("severity of the corruption (0: none)", "fraction of right predictions", (4.2, 3.6))
    axes.plot(list(curve), [1 - error for error in curve.values()], marker="o")
    axes.set(ylim=(0, 1.02), xticks=list(curve))
    return data_url(axes.figure)


def noise_chart(errors: Mapping[int, float]) -> str:
    """Plot the accuracy over the noise. errors: standard deviation of Gaussian noise in grey levels, 0 included → error in 0…1."""
    axes = _axes(
        "standard deviation of Gaussian noise, in grey levels (0…255)", "fraction of right predictions", (4.2, 3.6)
    )
    axes.plot(list(errors), [1 - error for error in errors.values()], marker="o")
    axes.set(ylim=(0, 1.02), xticks=list(errors))
    return data_url(axes.figure)


def two_histograms(reference: np.ndarray, new: np.ndarray, name: str) -> str:
    """Plot two histograms as fractions, over common bins. Non-finite values are skipped."""
    reference, new = (values[np.isfinite(values)] for values in (reference, new))
    axes = _axes(name, "fraction of samples", (4.2, 3.0))
    edges = np.histogram_bin_edges(np.concatenate([reference, new]), bins=30)
    for values, label in ((reference, "reference"), (new, "new")):
        axes.hist(values, bins=edges, weights=np.full(len(values), 1 / max(1, len(values))), alpha=0.55, label=label)
    axes.legend(fontsize=8)
    return data_url(axes.figure)


def two_fractions(reference: np.ndarray, new: np.ndarray, labels: Sequence[str], most: int) -> str:
    """Plot two counts (C,) as fractions side by side, for the `most` labels whose fractions differ most."""
    fractions = [counts / max(1, counts.sum()) for counts in (reference, new)]
    shown = np.sort(np.argsort(-np.abs(fractions[0] - fractions[1]), kind="stable")[:most])
    with literal_text():
        axes = _axes("", "fraction of samples", (max(4.2, 0.45 * len(shown)), 3.4))
        for side, values, label in ((-0.2, fractions[0], "reference"), (0.2, fractions[1], "new")):
            axes.bar(np.arange(len(shown)) + side, values[shown], 0.4, label=label)
        axes.set_xticks(range(len(shown)))
        axes.set_xticklabels([short(labels[i]) for i in shown], rotation=60, ha="right", fontsize=8)
        axes.legend(fontsize=8)
        return data_url(axes.figure)


def _axes(x: str, y: str, size: tuple[float, float]):
    from matplotlib.figure import Figure

    axes = Figure(figsize=size, layout="constrained").add_subplot(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return axes
