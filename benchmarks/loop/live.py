"""How often the 95 % intervals of a server's live accuracy contain the true values. It measures no speed.

A repetition draws predictions of a model whose accuracies are known, records them in the server's own store, and gives feedback on a
fraction, drawn at random. The confidence of class c is 0.5 + 0.5 X, with X from Beta(STRENGTHS[c], 1); a prediction is right with a
probability of its confidence minus 0.05. So the accuracy of class c is 0.45 + 0.5 a / (a + 1), and confidence minus accuracy is 0.05.
"""

import argparse
import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np

from benchmarks.report import environment, write
from refract.augment.preprocess import Preprocess
from refract.models.bundle.info import BundleInfo
from refract.models.intervals import wilson
from refract.serve.feedback.recent_predictions import RecentPredictions

STRENGTHS = np.array([8.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.5])
"""For each class the first parameter of its Beta distribution: the larger, the more accurate the class."""

FREQUENCIES = np.array([0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04])
OVERCONFIDENCE = 0.05
BATCH = 1000
"""Images in one recorded request."""

CLASS_ACCURACIES = 0.5 - OVERCONFIDENCE + 0.5 * STRENGTHS / (STRENGTHS + 1)
ACCURACY = float(FREQUENCIES @ CLASS_ACCURACIES)


@dataclasses.dataclass(frozen=True)
class Model:
    """What the store reads of a bundle."""

    info: BundleInfo
    digest: str = "0123456789abcdef"


def model() -> Any:
    """Return a model with a class for each of STRENGTHS."""
    info = BundleInfo(
        name="simulated", task="multiclass", labels=tuple(f"class {c}" for c in range(len(STRENGTHS))),
        network={"name": "none", "image_size": [8, 8], "args": {}},
        preprocess=Preprocess(height=8, width=8).to_dict(),
        temperature=1.0, thresholds=(), metrics={}, versions={}, created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return Model(info)


def predictions(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` predictions. Returns the probabilities (count, C), and the true classes (count,)."""
    classes = len(STRENGTHS)
    truth = rng.choice(classes, count, p=FREQUENCIES)
    confidence = 0.5 + 0.5 * rng.beta(STRENGTHS[truth], 1)
    right = rng.random(count) < confidence - OVERCONFIDENCE
    predicted = np.where(right, truth, (truth + rng.integers(1, classes, count)) % classes)
    rest = (1 - confidence) / (classes - 1)
    rows = np.repeat(rest[:, None], classes, axis=1)
    rows[np.arange(count), predicted] = confidence
    return rows.astype(np.float32), truth


def covered(served: Any, count: int, fraction: float, rng: np.random.Generator) -> dict[str, tuple[bool, float]]:
    """Run one repetition. Returns whether each interval contains the true value, and its width."""
    store = RecentPredictions(served.info, keep=count, hours=1, clock=lambda: 0.0)
    rows, truth = predictions(count, rng)
    for start in range(0, count, BATCH):
        store.record(str(start // BATCH), served, rows[start : start + BATCH])
    for number in rng.choice(count, round(fraction * count), replace=False).tolist():
        store.judge(str(number // BATCH), [int(truth[number])], number % BATCH)
    (live,) = store.live()
    true_values = {row.label: CLASS_ACCURACIES[int(row.label.removeprefix("class "))] for row in live.classes}
    intervals = {row.label: row.accuracy for row in live.classes}
    true_values |= {"accuracy": ACCURACY, "calibration": OVERCONFIDENCE}
    intervals |= {"accuracy": live.accuracy, "calibration": live.calibration}
    return {
        name: (bool(interval.low <= true_values[name] <= interval.high), interval.high - interval.low)
        for name, interval in intervals.items()
    }


def live(count: int, fraction: float, repetitions: int, seed: int) -> dict[str, Any]:
    """Return the fraction of the repetitions whose interval contains the true value, with its own interval, for each estimate."""
    served, hits, widths = model(), defaultdict[str, list[bool]](list), defaultdict[str, list[float]](list)
    for repetition in range(repetitions):
        for name, (contains, width) in covered(
            served, count, fraction, np.random.default_rng([seed, repetition])
        ).items():
            hits[name].append(contains)
            widths[name].append(width)
    rows = {}
    for name in sorted(hits):
        runs = len(hits[name])
        low, high = wilson(np.array([sum(hits[name])]), np.array([runs]))[0].tolist()
        coverage = {"coverage": sum(hits[name]) / runs, "low": round(low, 4), "high": round(high, 4)}
        rows[name] = {**coverage, "repetitions": runs, "mean_width": round(sum(widths[name]) / runs, 4)}
    return rows


def main(args: argparse.Namespace) -> int:
    """Run the stage, print and write its result. Returns 1 if the coverage of the accuracy is outside of 93 to 97 %."""
    rows = live(args.predictions, args.fraction, args.repetitions, args.seed)
    for name, row in rows.items():
        print(
            f"{name:12} {row['coverage']:.1%} ({row['low']:.1%} to {row['high']:.1%}), mean width {row['mean_width']:.3f}"
        )
    if args.json:
        options = {"predictions": args.predictions, "fraction": args.fraction, "seed": args.seed}
        write(args.json, {**environment("numpy"), "stage": args.stage, **options, "coverage": rows})
    return 0 if 0.93 <= rows["accuracy"]["coverage"] <= 0.97 else 1
