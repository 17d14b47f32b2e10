"""The weights that a retraining starts from (`retrain.start_from`): those of the config, the champion's, or the better of both.

The validation set chooses between two trainings, the holdout never does. An image that the champion was trained on therefore stays in the
training set, so that no model is validated on images that its weights have seen.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refract.pipeline.config.config import Config
from refract.pipeline.data.manifest import load_manifest
from refract.pipeline.retraining.champion_data import champion_splits
from refract.pipeline.retraining.exact_duplicates import contents
from refract.pipeline.retraining.snapshot import Snapshot
from refract.pipeline.tracking.aliases import CHAMPION
from refract.pipeline.tracking.model_registry import registry_of

log = logging.getLogger(__name__)

SCRATCH = "scratch"

Start = dict[str, Any]
"""The record of the start as JSON: `candidates` (scratch, champion), `champion` (version or None), `why` where the config's choice was not
possible; after the training `won`, and for two candidates `accuracy` and `images` of the validation set, and `runs`."""


def plan(config: Config) -> tuple[Start, Mapping[str, str]]:
    """Return (what to train, content → split of the samples that the champion was trained and validated on).

    Both are empty for `retrain.start_from: scratch`. Raises the errors of MLflow.
    """
    wanted = config.retrain.start_from
    if wanted == SCRATCH:
        return {}, {}
    client, _, aliases = registry_of(config.tracking)
    version = aliases.get(CHAMPION)
    if version is None:
        return _from_scratch({}, "no version is champion yet"), {}
    start = {"candidates": [SCRATCH, CHAMPION] if wanted == "auto" else [CHAMPION], "champion": version}
    splits = champion_splits(config, client, version)
    if splits is None:
        unknown = f"MLflow has no splits.csv of version {version}, so the training images of the champion are unknown"
        if wanted == "auto":
            return _from_scratch(start, f"{unknown}, and the validation set cannot compare it"), {}
        log.warning("start: %s; the validation metrics may be too high", unknown)
    return start, splits or {}


def checked(start: Start, splits: Mapping[str, str], snapshot: Snapshot) -> Start:
    """Return the plan without the champion if it was trained on images of the holdout, which its successors would have seen, too."""
    if CHAMPION not in start.get("candidates", ()):
        return start
    held = load_manifest(snapshot.manifest, snapshot.task).of("test")
    overlap = sum(not contents(sample).isdisjoint(splits) for sample in held)
    if not overlap:
        return start
    return _from_scratch(start, f"the champion was trained on {overlap} images of the holdout")


def _from_scratch(start: Start, why: str) -> Start:
    log.warning("start: from scratch: %s", why)
    return {"champion": None, **start, "candidates": [SCRATCH], "why": why}


def candidates(config: Config, start: Start) -> dict[str, Config]:
    """Return the configs to train, by the names of their starts."""
    champion = f"models:/{config.tracking.model_name}/{start.get('champion')}"
    names = start.get("candidates", [SCRATCH])
    return {name: config if name == SCRATCH else config.changed({"model.weights": champion}) for name in names}


def choose(start: Start, runs: Mapping[str, Path], snapshot: Snapshot) -> Start:
    """Return the record with the winner: the run whose bundle has the higher accuracy on the validation set. A tie goes to scratch.

    runs: the finished runs by the names of their starts. BundleError if a bundle cannot predict the samples.
    """
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.retraining.gate import measure

    if len(runs) == 1:
        return {**start, "won": next(iter(runs))}
    whole = load_manifest(snapshot.manifest, snapshot.task)
    validation = whole.with_samples(whole.of("val"))
    bundles = {name: load_bundle(run / "bundle") for name, run in runs.items()}
    accuracy = {name: float(measure(bundle, validation).right.mean()) for name, bundle in bundles.items()}
    won = CHAMPION if accuracy[CHAMPION] > accuracy[SCRATCH] else SCRATCH
    log.info(
        "start: %s wins on %d validation images: accuracy %.4f from scratch, %.4f from the champion",
        won,
        len(validation.samples),
        accuracy[SCRATCH],
        accuracy[CHAMPION],
    )
    paths = {name: str(run) for name, run in runs.items()}
    return {**start, "won": won, "accuracy": accuracy, "images": len(validation.samples), "runs": paths}


def described(start: Start) -> str:
    """Return the start of the registered version, as its tag in MLflow."""
    if start["won"] == SCRATCH:
        return SCRATCH
    return f"champion, version {start['champion']}"
