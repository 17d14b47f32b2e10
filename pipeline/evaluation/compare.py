"""Compare runs: differing config keys, metrics, and whether the accuracies differ significantly on common test samples."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refract.models.prediction import predicted_labels
from refract.pipeline.config.config import ConfigError
from refract.pipeline.config.renamed import with_new_keys
from refract.pipeline.evaluation import measures
from refract.pipeline.evaluation.assess import HISTORY, PREDICTIONS
from refract.pipeline.evaluation.plots import literal_text, save


@dataclass(frozen=True)
class RunPredictions:
    """The test predictions, metrics and config of a finished run.

    right: path of a test sample → whether its prediction is right, for multi-label in all labels; labels: path → names of its true labels.
    """

    name: str
    config: dict[str, Any]
    metrics: dict[str, float]
    history: list[dict[str, float]]
    right: dict[str, bool]
    labels: dict[str, tuple[str, ...]]

    @property
    def metric(self) -> str:
        """The name of the fraction of right predictions."""
        return "subset accuracy" if "subset_accuracy" in self.metrics else "accuracy"


def read_run(place: Path | str) -> RunPredictions:
    """Read a run. place: its folder, or the URL of its copy. Raises ConfigError if it is not finished, RemoteError."""
    from refract.models.bundle.bundle import load_bundle

    path = place if isinstance(place, Path) else _fetched(place)
    name = place.name if isinstance(place, Path) else place.rstrip("/").rpartition("/")[2]
    try:
        with np.load(path / PREDICTIONS, allow_pickle=False) as stored:
            paths, truth, probabilities = (stored[name] for name in ("paths", "truth", "probabilities"))
        history = json.loads((path / HISTORY).read_text("utf-8"))
    except FileNotFoundError as error:
        reason = f"it has no {Path(error.filename).name}" if path.is_dir() else "no such folder"
        raise ConfigError(f"{path}: not the folder of a finished run: {reason}; name one, such as runs/NAME") from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: not the folder of a finished run: {error}") from error
    info = load_bundle(path / "bundle").info
    rows = truth if truth.ndim == 2 else truth[:, None] == np.arange(len(info.labels))
    right = (predicted_labels(probabilities, info.task, info.thresholds) == rows).all(axis=1)
    named = [tuple(info.labels[i] for i in np.flatnonzero(row)) for row in rows]
    by_path = (dict(zip(paths.tolist(), values, strict=True)) for values in (right.tolist(), named))
    config = with_new_keys(info.config, str(path))
    return RunPredictions(name, config, info.metrics, history, *by_path)


def _fetched(url: str) -> Path:
    """Return the local copy of what `read_run` reads of a run at a URL. ConfigError if it is not finished, RemoteError."""
    from refract.remote import client
    from refract.remote.address import checked
    from refract.remote.folders import stored, versions_of

    url = checked(url)
    items = {item.url.removeprefix(f"{url}/"): item for item in client.listed(url)}
    for name in (PREDICTIONS, HISTORY, "bundle/manifest.json"):
        if name not in items:
            raise ConfigError(f"{url}: not the copy of a finished run: it has no {name}; wait until its training ends")
    needed = [item for name, item in items.items() if name in (PREDICTIONS, HISTORY) or name.startswith("bundle/")]
    return stored(url, versions_of(needed), "runs", lambda: needed)


def differences(runs: Sequence[RunPredictions]) -> dict[str, list[Any]]:
    """Return config key → its value in each run, for keys whose values differ. The runs' names and folders are skipped."""
    flat = [dict(flattened(run.config)) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    skipped = ("trainer.run_name", "trainer.runs_dir", "trainer.copy_to")
    rows = {key: [values.get(key) for values in flat] for key in keys if key not in skipped}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def against(base: RunPredictions, other: RunPredictions) -> tuple[measures.Difference, int]:
    """Return the accuracy of `other` minus that of `base` on their common test samples, and the number of these.

    Raises ConfigError if the runs have no common test sample, or if a common one has different labels.
    """
    shared = [path for path in base.right if path in other.right]
    if not shared:
        raise ConfigError(
            f"{base.name} and {other.name} have no test sample in common; compare runs with the same data and seed"
        )
    conflicts = [path for path in shared if base.labels[path] != other.labels[path]]
    if conflicts:
        labels = " and ".join(";".join(run.labels[conflicts[0]]) or "nothing" for run in (base, other))
        raise ConfigError(
            f"{base.name} and {other.name} were measured on different labels: {len(conflicts)} common test samples differ, "
            f"such as {conflicts[0]}: {labels}"
        )
    pair = (np.array([run.right[path] for path in shared]) for run in (other, base))
    return measures.paired_difference(*pair), len(shared)


def curves(runs: Sequence[RunPredictions], path: Path) -> None:
    """Plot the validation metrics of all runs over the epochs, as PNG."""
    from matplotlib.figure import Figure

    names = [
        name
        for name in ("val_loss", "val_accuracy", "val_map")
        if any(name in row for run in runs for row in run.history)
    ]
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1, xlabel="epoch", title=name)
        for run in runs:
            points = [(epoch + 1, row[name]) for epoch, row in enumerate(run.history) if name in row]
            axes.plot(*zip(*points, strict=True), marker=".", label=run.name)
        axes.grid(alpha=0.3)
        with literal_text():
            axes.legend()
    save(figure, path)


def flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, value) of nested mappings."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        rows += flattened(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return rows
