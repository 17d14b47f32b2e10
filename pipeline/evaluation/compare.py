"""Runs side by side: what differs in their configs, their figures, and whether the difference on one hold-out is more than chance."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refract.models.prediction import given_labels
from refract.pipeline.config.config import ConfigError
from refract.pipeline.evaluation import measures
from refract.pipeline.evaluation.assess import ANSWERS, HISTORY
from refract.pipeline.evaluation.plots import own_names, save


@dataclass(frozen=True)
class RunPredictions:
    """A finished run as its folder tells it. right: path of a hold-out image → whether the answer was right (multilabel: all labels);
    labels: path → the names of its true labels."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, float]
    history: list[dict[str, float]]
    right: dict[str, bool]
    labels: dict[str, tuple[str, ...]]


def read_run(path: Path) -> RunPredictions:
    """ConfigError where the folder is no finished run."""
    from refract.models.bundle.bundle import load_bundle

    try:
        with np.load(path / ANSWERS, allow_pickle=False) as stored:
            paths, truth, given = (stored[name] for name in ("paths", "truth", "probabilities"))
        history = json.loads((path / HISTORY).read_text("utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: is no finished run: {error}") from error
    info = load_bundle(path / "bundle").info
    rows = truth if truth.ndim == 2 else truth[:, None] == np.arange(len(info.labels))
    right = (given_labels(given, info.task, info.thresholds) == rows).all(axis=1)
    named = [tuple(info.labels[i] for i in np.flatnonzero(row)) for row in rows]
    known = (dict(zip(paths.tolist(), values, strict=True)) for values in (right.tolist(), named))
    return RunPredictions(path.name, info.config, info.metrics, history, *known)


def differences(runs: Sequence[RunPredictions]) -> dict[str, list[Any]]:
    """Config keys that are not the same in all runs → their values; the runs' own names and places left out."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    own = ("trainer.run_name", "trainer.runs_dir")
    rows = {key: [values.get(key) for values in flat] for key in keys if key not in own}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def against(one: RunPredictions, other: RunPredictions) -> tuple[measures.Difference, int]:
    """(other's accuracy minus one's on the images that both held out, how many those are). ConfigError where there are none, or where
    the same image has other labels in the two."""
    shared = [path for path in one.right if path in other.right]
    if not shared:
        raise ConfigError(
            f"{one.name} and {other.name} have no image of their hold-outs in common: they cannot be compared"
        )
    torn = [path for path in shared if one.labels[path] != other.labels[path]]
    if torn:
        labels = " and ".join(";".join(run.labels[torn[0]]) or "nothing" for run in (one, other))
        raise ConfigError(
            f"{one.name} and {other.name} were not measured on the same data: {len(torn)} images of both hold-outs have other labels, as "
            f"{torn[0]}: {labels}"
        )
    pair = (np.array([run.right[path] for path in shared]) for run in (other, one))
    return measures.paired_difference(*pair), len(shared)


def curves(runs: Sequence[RunPredictions], path: Path) -> None:
    """The validation figures of all runs over the epochs, as PNG."""
    from matplotlib.figure import Figure

    names = [
        name
        for name in ("val_loss", "val_accuracy", "val_map")
        if any(name in row for run in runs for row in run.history)
    ]
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), place + 1, xlabel="epoch", title=name)
        for run in runs:
            points = [(epoch + 1, row[name]) for epoch, row in enumerate(run.history) if name in row]
            axes.plot(*zip(*points, strict=True), marker=".", label=run.name)
        axes.grid(alpha=0.3)
        with own_names():
            axes.legend()
    save(figure, path)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        rows += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return rows
