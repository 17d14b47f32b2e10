"""The drift report: the checks, the distributions of both data sets, and the images that drifted most."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refract.pipeline.data.manifest import Sample
from refract.pipeline.drift.compare import Drift
from refract.pipeline.drift.profile import Profile
from refract.pipeline.evaluation.report import Report, figures

SHOWN = 24
CLASSES_SHOWN = 30


def drift_numbers(drift: Drift, facts: Mapping[str, Any], samples: Sequence[Sample] = ()) -> dict[str, Any]:
    """Return the report's JSON values. samples: the new data, in the profile's order."""
    furthest = [
        {"path": samples[i].path, "distance": float(drift.distances[i])}  # type: ignore[index]
        for i in drift.furthest(SHOWN) if samples
    ]  # fmt: skip
    return {"facts": dict(facts), **drift.to_dict(), "furthest": furthest}


def make_drift_report(
    title: str,
    drift: Drift,
    reference: Profile,
    new: Profile,
    *,
    facts: Mapping[str, Any],
    samples: Sequence[Sample] = (),
    probabilities: np.ndarray | None = None,
    galleries: Mapping[str, list[dict[str, str]]] | None = None,
) -> Report:
    """Build the report. samples, probabilities: the new data in the profile's order, for the gallery; galleries: further galleries."""
    numbers = drift_numbers(drift, facts, samples)
    shown = {"confidence": figures.two_histograms(reference.confidence, new.confidence, "confidence")}
    for name in (check.name for check in drift.checks if check.name in reference.statistics):
        shown[name] = figures.two_histograms(reference.statistics[name], new.statistics[name], name)
    if reference.classes is not None and new.classes is not None:
        known = list(dict.fromkeys((*reference.classes, *new.classes)))
        before, after = (
            np.array([counts.get(label, 0) for label in known]) for counts in (reference.classes, new.classes)
        )
        shown["labels of the data"] = figures.two_fractions(before, after, known, CLASSES_SHOWN)
    shown["answers"] = figures.two_fractions(reference.answered, new.answered, reference.labels, CLASSES_SHOWN)
    images: dict[str, list[dict[str, str]]] = {}
    if samples and drift.distances is not None:
        images["The images that drifted most"] = furthest_images(
            samples, drift.distances, drift.usual or 0.0, drift.furthest(SHOWN), probabilities, reference.labels
        )
    return Report(title, numbers, shown, {**images, **(galleries or {})}, template="drift.html")


def furthest_images(
    samples: Sequence[Sample],
    distances: np.ndarray,
    usual: float,
    indices: Sequence[int],
    probabilities: np.ndarray | None,
    labels: Sequence[str],
) -> list[dict[str, str]]:
    """Build the rows of a gallery; a sample without an image is shown by its text."""
    rows = []
    for i in indices:
        far = f"{distances[i] / usual:.2f} × the usual maximum" if usual else f"distance {distances[i]:.3g}"
        if probabilities is not None:
            best = int(probabilities[i].argmax())
            far = f"{labels[best]} {probabilities[i, best]:.0%}; {far}"
        sample = samples[i]
        text = f": “{sample.text.strip()[:120]}”" if sample.text.strip() else ""
        src = figures.thumbnail(sample.read()) if sample.has_image else ""
        rows.append({"src": src, "caption": far + text, "path": sample.path})
    return rows
