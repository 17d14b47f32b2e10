"""What the corrections changed (`retrain.effect_of_labels`): the same recipe with and without them, compared on the frozen holdout."""

import logging
from pathlib import Path
from typing import Any

from refract.errors import InputError
from refract.pipeline.config.config import Config
from refract.pipeline.data.manifest import Manifest
from refract.pipeline.retraining.snapshot import Snapshot
from refract.pipeline.retraining.stored_snapshots import WITHOUT_TABLE
from refract.pipeline.retraining.trainings import WITHOUT, train_one, training_run
from refract.pipeline.retraining.workspace import Record

log = logging.getLogger(__name__)

Effect = dict[str, Any]
"""The effect as JSON: `summary`; after the training also `training_run`; after the comparison also `samples`, `with`, `without`
(accuracies), `gain`, `low`, `high` (its 95 % interval), `better`, `worse` (samples that only one of the two predicts correctly) and `p`."""


def train_without(folder: Path, config: Config, record: Record, taken: Snapshot) -> Effect | None:
    """Train the config on the data without the corrections since the champion, in a run that is not registered.

    config: the config of the training with the corrections. Returns None if `retrain.effect_of_labels` is off, or without a label history.
    """
    corrections = record.get("corrections")
    if not config.retrain.effect_of_labels or corrections is None:
        return None
    if not corrections["count"]:
        return {"summary": "not measured: no corrections since the champion"}
    table = taken.folder / WITHOUT_TABLE
    if not table.exists():
        return {"summary": "not measured: the corrections change no training image"}
    run = training_run(folder, config.trainer.runs_dir, config.tracking.model_name, WITHOUT)
    log.info("labels: training without the corrections, to measure their effect")
    changes = {"data.source": str(table), "data.on_bad_file": "skip"}
    tags = {"data.corrections": f"without those since decision {corrections['since']}"}
    try:
        train_one(run, config.changed(changes), tags)
    except InputError as error:  # such as a class that only corrections fill
        log.warning("labels: the effect of the corrections is not measured: %s", error)
        return {"summary": f"not measured: {error}"}
    return {"summary": "trained", "training_run": str(run)}


def measured(effect: Effect, record: Record, held: Manifest) -> Effect:
    """Compare the trainings with and without the corrections on the holdout. Returns `effect` with the result.

    The test is McNemar's exact one, two-sided: corrections may harm. BundleError if a bundle cannot predict the samples.
    """
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.evaluation.measures import paired_difference
    from refract.pipeline.retraining.gate import measure

    if "training_run" not in effect:
        return effect
    runs = (record["training_run"], effect["training_run"])
    new, old = (measure(load_bundle(Path(run) / "bundle"), held).right for run in runs)
    gain = paired_difference(new, old)
    better, worse = int((new & ~old).sum()), int((old & ~new).sum())
    summary = (
        f"{gain.value:+.4f} by {record['corrections']['count']:,} corrections: accuracy {new.mean():.4f} with and {old.mean():.4f} without "
        f"them on {len(new):,} samples, 95 % interval {gain.low:+.4f} to {gain.high:+.4f}, p = {gain.p_value:.2g} "
        f"({better} better, {worse} worse)"
    )
    numbers = {
        "gain": gain.value,
        "low": gain.low,
        "high": gain.high,
        "p": gain.p_value,
        "better": better,
        "worse": worse,
    }
    accuracies = {"samples": len(new), "with": float(new.mean()), "without": float(old.mean())}
    return {**effect, "summary": summary, **accuracies, **numbers}
