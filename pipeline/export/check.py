"""Compare an export with its bundle on the golden samples."""

from typing import NamedTuple

import numpy as np

from refract.errors import first_line
from refract.models.bundle.info import BundleInfo
from refract.models.prediction import predicted_labels
from refract.pipeline.export.target import ExportError, Run

BOUND, INT8_BOUND = 1e-3, 0.3
"""Largest allowed difference of a probability from the bundle's network in float32 on this machine. Exports in float32 differ by 1e-6 to
1e-4. In 8-bit integers the measured accuracy decides; the bound only finds a broken export."""

LOGIT_BOUND = 0.01
"""Largest allowed difference of a logit in float32, as a fraction of the bundle's largest. A confident network returns equal probabilities
for nearly all pixels, also for wrong ones; its logits differ."""

STORED_BOUND = 2e-3
"""Largest allowed difference of the bundle's network on this machine from the bundle's stored probabilities, as in `refract serve`."""


class Comparison(NamedTuple):
    """samples: golden samples; bound: allowed, largest: measured difference of a probability; other_labels: samples with other predicted
    labels, whose probabilities are within `bound` of a tie."""

    samples: int
    bound: float
    largest: float
    other_labels: int


def compare(
    run: Run,
    images: np.ndarray,
    expected: tuple[np.ndarray, np.ndarray],
    info: BundleInfo,
    name: str,
    *,
    samples: int,
    bound: float,
    remedy: str,
) -> Comparison:
    """Run the export on the golden images, as one batch and one by one, and compare it with the bundle.

    images: uint8 N×H×W×3, the golden images and perhaps copies of them; samples: the number of golden images, which come first; expected:
    the bundle's probabilities and logits, (N, C) each; name: the target, and remedy: what to do, for errors.
    ExportError if a probability differs by more than `bound`, if a logit in float32 differs by more than LOGIT_BOUND allows, or if
    another label is predicted whose probability is not within `bound` of the deciding one.
    """
    whole = _outputs(run, images, name)
    each = [_outputs(run, images[i : i + 1], name) for i in range(len(images))]
    single = tuple(np.concatenate(rows) for rows in zip(*each, strict=True))
    if whole[0].shape != expected[0].shape:
        raise ExportError(
            f"--to {name}: the export returns probabilities of shape {whole[0].shape}, not {expected[0].shape}"
        )
    largest, logits = (
        max(float(np.abs(got[i] - expected[i]).max()) for got in (whole, single)) for i in range(len(expected))
    )
    limit = LOGIT_BOUND * max(1.0, float(np.abs(expected[1]).max())) if bound < INT8_BOUND else np.inf
    for output, gap, allowed in (("probability", largest, bound), ("logit", logits, limit)):
        if not gap <= allowed:  # also for NaN
            raise ExportError(
                f"--to {name}: the export changes a {output} of the golden samples by {gap:.3g}; at most {allowed:.3g} is allowed. "
                f"Nothing was written; {remedy}"
            )
    differing, ties = (
        _differing(whole[0], expected[0], info, within) | _differing(single[0], expected[0], info, within)
        for within in (bound, 0)
    )
    if differing.any():
        raise ExportError(
            f"--to {name}: the export predicts another label for {min(int(differing.sum()), samples)} of {samples} golden samples. "
            f"Nothing was written; {remedy}"
        )
    return Comparison(samples, bound, largest, int(ties[:samples].sum()))


def _outputs(run: Run, images: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities and the logits."""
    try:
        probabilities, logits = run(np.ascontiguousarray(images))
    except Exception as err:  # from four runtimes
        raise ExportError(
            f"--to {name}: the export fails for {len(images)} image{'s' * (len(images) > 1)}: {first_line(err)}; use another target"
        ) from err
    return np.asarray(probabilities), np.asarray(logits)


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
