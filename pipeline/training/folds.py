"""Train one model for each fold, as ordinary runs in one folder, and report the spread of their metrics."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from refract.augment.policy import load_policy
from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.config.sections import TrainerConfig
from refract.pipeline.tracking.address import check_address, tracking_uri
from refract.pipeline.training.provenance import code_state, flat_tags, inputs, machine, origin
from refract.pipeline.training.ranks import current_ranks
from refract.pipeline.training.run import new_record, open_tracker, status_reported, train
from refract.pipeline.training.run_copy import copied
from refract.pipeline.training.run_directory import (
    RECORD,
    Run,
    new_run,
    read_record,
    resume_run,
    run_lock,
    stored_config,
)
from refract.plugins import load

if TYPE_CHECKING:
    from refract.pipeline.data.prepare import FoldedData
    from refract.pipeline.evaluation.folds import FoldsAssessment
    from refract.pipeline.tracking import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoldsResult:
    """run_dir: the folder with the runs fold-1, fold-2 …; waiting: number of entries that MLflow has not received; not_copied: why the
    copy at trainer.copy_to is not complete, None if it is."""

    run_dir: Path
    assessment: "FoldsAssessment"
    waiting: int = 0
    not_copied: str | None = None


def train_folds(config: Config, *, name: str = "run", resume: Path | None = None) -> FoldsResult:
    """Train `trainer.folds` models, one after another, and assess their out-of-fold predictions.

    name, resume: see `train`; a resumed training keeps finished folds and resumes the unfinished one. No fold registers a model.
    Raises as `train`, and ConfigError with several ranks.
    """
    from refract.pipeline.data.prepare import prepare_folds
    from refract.pipeline.evaluation.folds import assess_folds
    from refract.pipeline.labels.address import pinned
    from refract.pipeline.training.device import choose_device, choose_precision

    load(config.plugins)
    device = choose_device(config.trainer.device)
    _refuse_ranks(config.trainer, device)
    if config.tracking.enabled:
        check_address(tracking_uri(config.tracking))
    config = config.changed({"data.labels": pinned(config.data.labels)})
    data = prepare_folds(config)
    code, _ = code_state()
    hardware = machine(device, choose_precision(config.trainer, device))
    record = new_record(config, name, data.fingerprint, inputs(config), code, hardware)
    # The file of a policy may change between two folds.
    config = config.changed({"augment.policy": load_policy(config.augment.policy).to_spec()})
    run = new_run(config, name, record) if resume is None else resume_run(resume, record)
    with run_lock(run.path), copied(run, config.trainer.copy_to) as copy:
        tracker = _open_tracker(config, run, data)
        with status_reported(run, tracker):
            for fold in range(1, config.trainer.folds + 1):
                log.info("fold %d of %d", fold, config.trainer.folds)
                _train_fold(config, run, data, fold, _tags(run, tracker))
                if config.data.decode_on == "auto":  # the first fold has timed the input paths
                    chosen = stored_config(run.path / f"fold-{fold}").data.decode_on
                    config = config.changed({"data.decode_on": chosen})
            assessment = assess_folds(run.path, data, config, device)
            files = assessment.report.write(run.path)
            if tracker is not None:
                tracker.log_metrics(_metrics(assessment))
                tracker.log_files(
                    [*files, *(run.path / file for file in ("config.yaml", RECORD, "out_of_fold.parquet"))]
                )
        run.finish()
    waiting = 0 if tracker is None else sum(1 for _ in tracker.journal.waiting())
    return FoldsResult(run.path, assessment, waiting, copy.error)


def _refuse_ranks(trainer: TrainerConfig, device: str) -> None:
    count = current_ranks(trainer.devices, device).count
    if count > 1:
        raise ConfigError(
            f"trainer.folds: {trainer.folds} trains in one process, got {count} ranks (trainer.devices or torchrun); "
            "set trainer.devices: 1, or train each fold by itself, from trainer.fold: 1 on"
        )


def _open_tracker(config: Config, run: Run, data: "FoldedData") -> "Tracker | None":
    """Open the run in MLflow that is the parent of the folds' runs, if tracking is enabled."""
    if not config.tracking.enabled:
        return None
    counts = {key: value for key, value in data.identity.items() if key != "content"}
    counts |= {"source": data.manifest.source, "fingerprint": data.fingerprint}
    tags = flat_tags(data=counts, code=run.record["code"], machine=run.record["machine"])
    tags |= {"folds": str(config.trainer.folds)} | origin(f"refract train {run.record['name']}")
    return open_tracker(config, run, tags)


def _tags(run: Run, tracker: "Tracker | None") -> dict[str, str]:
    """Return the tags of a fold's run in MLflow. The parent is unknown while MLflow does not answer."""
    parent = None if tracker is None else tracker.journal.delivered.get("run_id")
    return {"folds.run": run.path.name} | ({"mlflow.parentRunId": parent} if parent else {})


def _train_fold(config: Config, run: Run, data: "FoldedData", fold: int, tags: Mapping[str, str]) -> None:
    """Train a fold, resume it, or do nothing if it is finished."""
    path = run.path / f"fold-{fold}"
    if path.exists() and not (path / RECORD).exists():
        shutil.rmtree(path)  # the process was killed before the first record
    if not path.exists():
        place = {"trainer.fold": fold, "trainer.runs_dir": str(run.path), "trainer.run_name": path.name}
        train(
            config.changed({**place, "trainer.copy_to": None, "tracking.model_name": None}),
            prepared=data.of(fold),
            tags=tags,
        )
    elif not read_record(path).get("finished"):
        train(stored_config(path), resume=path, prepared=data.of(fold), tags=tags)


def _metrics(assessment: "FoldsAssessment") -> dict[str, float]:
    """Return the metrics of the parent run: mean and standard deviation of each metric over the folds."""
    spreads = {"out_of_fold": assessment.out_of_fold, "test": assessment.test}
    return {
        f"{part}_{name}_{kind}": getattr(spread, kind)
        for part, metrics in spreads.items()
        for name, spread in metrics.items()
        for kind in ("mean", "deviation")
    }
