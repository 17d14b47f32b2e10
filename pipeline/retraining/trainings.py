"""The trainings of a retraining run's step `train`: their folders, and how one starts or resumes."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from refract.pipeline.config.config import Config
from refract.pipeline.retraining.run import run_config

WITHOUT = "without-corrections"
"""The name of the training that `retrain.effect_of_labels` adds."""


def training_run(folder: Path, runs_dir: str, model_name: str | None, name: str = "") -> Path:
    """Return the folder of a training in the step `train` of the retraining run in `folder`.

    runs_dir: `trainer.runs_dir`; model_name: `tracking.model_name`; name: its start, if the step trains from several, or WITHOUT.
    """
    return Path(runs_dir) / "-".join(filter(None, (model_name, folder.name, name)))


def join_training(folder: Path) -> None:
    """Train as a further rank of the training that rank 0 has started in the run's step `train`. Raises what a training raises."""
    from refract.pipeline.training.run import train as train_run
    from refract.pipeline.training.run_directory import stored_config

    config = run_config(folder)
    run = _latest_run(folder, config.trainer.runs_dir, config.tracking.model_name)
    train_run(stored_config(run), resume=run)


def _latest_run(folder: Path, runs_dir: str, model_name: str | None) -> Path:
    """Return the folder of the step's training that started last; before the first one, that of a single training."""
    runs = [training_run(folder, runs_dir, model_name, name) for name in (WITHOUT, "champion", "scratch", "")]
    return next((run for run in runs if run.is_dir()), runs[-1])


def train_one(run: Path, config: Config, tags: Mapping[str, str]) -> None:
    """Train in the folder of the run, or resume it; nothing if it is finished. The step `register` registers the bundle.

    tags: further tags of the run in MLflow.
    """
    from refract.pipeline.training.run import train as train_run
    from refract.pipeline.training.run_directory import RECORD, read_record, stored_config

    if run.exists() and not (run / RECORD).exists():
        shutil.rmtree(run)  # the process was killed before the first record
    if not run.exists():
        train_run(config.changed({"trainer.run_name": run.name}), registers=False, tags=tags)
    elif not read_record(run).get("finished"):
        train_run(stored_config(run), resume=run, registers=False, tags=tags)
