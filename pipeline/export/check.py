"""Compare an export with its bundle on the golden samples."""

from typing import NamedTuple

import numpy as np

from refract.models.bundle.info import BundleInfo
from refract.models.prediction import predicted_labels
from refract.pipeline.export.target import ExportError, Run

BOUND, INT8_BOUND = 1e-3, 0.3
"""Largest allowed difference of a probability from the bundle's network in float32 on this machine. Exports in float32 differ by 1e-6 to
1e-4. In 8-bit integers the measured accuracy decides; the bound only finds a broken export."""

STORED_BOUND = 2e-3
"""Largest allowed difference of the bundle's network on this machine from the bundle's stored probabilities, as in `refract serve`."""


class Comparison(NamedTuple):
    """samples: golden samples; bound: allowed, largest: measured difference of a probability."""

    samples: int
    bound: float
    largest: float


def compare(
    run: Run, images: np.ndarray, expected: np.ndarray, info: BundleInfo, name: str, *, bound: float, remedy: str
) -> Comparison:
    """Run the export on the golden images, as one batch and one by one, and compare it with the bundle.

    images: uint8 N×H×W×3; expected: (N, C) the bundle's probabilities; name: the target, and remedy: what to do, for errors.
    ExportError if a probability differs by more than `bound`, or if another label is predicted whose probability is not within `bound` of
    the deciding one.
    """
    whole = _probabilities(run, images, name)
    single = np.concatenate([_probabilities(run, images[i : i + 1], name) for i in range(len(images))])
    if whole.shape != expected.shape:
        raise ExportError(f"--to {name}: the export returns probabilities of shape {whole.shape}, not {expected.shape}")
    largest = max(float(np.abs(got - expected).max()) for got in (whole, single))
    if not largest <= bound:  # also for NaN
        raise ExportError(
            f"--to {name}: the export changes a probability of the golden samples by {largest:.2g}; at most {bound:g} is allowed. "
            f"Nothing was written; {remedy}"
        )
    differing = _differing(whole, expected, info, bound) | _differing(single, expected, info, bound)
    if differing.any():
        raise ExportError(
            f"--to {name}: the export predicts another label for {int(differing.sum())} of {len(images)} golden samples. "
            f"Nothing was written; {remedy}"
        )
    return Comparison(len(images), bound, largest)


def _probabilities(run: Run, images: np.ndarray, name: str) -> np.ndarray:
    try:
        return np.asarray(run(np.ascontiguousarray(images))[0])
    except Exception as err:  # from four runtimes
        from refract.errors import first_line

        raise ExportError(
            f"--to {name}: the export fails for {len(images)} image{'s' * (len(images) > 1)}: {first_line(err)}; use another target"
        ) from err


def _differing(got: np.ndarray, expected: np.ndarray, info: BundleInfo, bound: float) -> np.ndarray:
    """Return (N,) whether the predicted labels differ by more than a tie: two labels, or a label and its threshold, within `bound`."""
    task = "multilabel" if info.task == "multilabel" else "multiclass"
    differs = predicted_labels(got, task, info.thresholds) != predicted_labels(expected, task, info.thresholds)
    if info.task == "multilabel":
        limits = np.array(info.thresholds or (0.5,) * expected.shape[1])
        return (differs & (np.abs(expected - limits) > bound)).any(axis=1)
    rows = np.arange(len(expected))
    margin = expected.max(axis=1) - expected[rows, got.argmax(axis=1)]
    return differs.any(axis=1) & (margin > bound)
