"""The search: Optuna draws the trials and stores them; each trial is a training, and is pruned if its scores are low."""

import itertools
import json
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from refract.models.credentials import masked
from refract.models.training.lightning_imports import Callback, lightning
from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.config.plugin_files import plugin_digests
from refract.pipeline.config.renamed import with_new_keys
from refract.pipeline.training.provenance import origin
from refract.pipeline.training.run_directory import run_lock, write_config
from refract.pipeline.tuning.space import Dimension, applies, with_values
from refract.plugins import load

log = logging.getLogger(__name__)

SAMPLERS = ("tpe", "random", "grid", "coarse-to-fine")
LABELS = "labels"
"""The attribute of a study with the value of `data.labels` in its trials."""
GRID = 4
"""Number of values of a numeric key in a grid."""
FINE_FROM = 0.5
"""Fraction of the trials after which coarse-to-fine narrows its ranges to those of the best trials."""
BEST_FRACTION, FEWEST_BEST = 0.25, 3
EXPLODED = 3.0
"""A trial stops if its loss exceeds this multiple of the first loss."""
KNOWN = 0.7
"""The lowest first loss for that limit, about the loss of a random guess between two classes. A lower first loss comes from pretrained
weights, and is too noisy in one batch."""


@dataclass(frozen=True)
class Search:
    """trials: number of trials of all processes and restarts; minutes: time limit for starting trials, or None; storage: Optuna's URL."""

    name: str
    sampler: str
    trials: int
    minutes: float | None
    storage: str
    seed: int


def open_study(search: Search, space: Sequence[Dimension], config: Config, folder: Path) -> optuna.Study:
    """Create the study, or load it to resume.

    ConfigError for an unusable storage, a sampler that does not fit the space, or a stored study of another space or config.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    try:
        study = optuna.create_study(
            study_name=search.name,
            storage=_storage(search.storage),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
            direction="maximize",
            load_if_exists=True,
        )
    except Exception as error:  # the databases' libraries raise many types
        shared = "; a search needs a separate database, not MLflow's" if "table schema" in str(error) else ""
        raise ConfigError(
            masked(f"--storage: {search.storage} cannot be used: {str(error).splitlines()[0]}{shared}")
        ) from error
    identity = {"space": repr(space), "config": json.dumps(_searched(config), sort_keys=True)}
    for key, value in identity.items():
        stored = study.user_attrs.setdefault(key, value)
        if key == "config":  # an earlier version may have stored it under former keys
            stored = json.dumps(with_new_keys(json.loads(stored), search.name), sort_keys=True)
        if stored != value:
            raise ConfigError(
                f"the {key} of the search {search.name} differs from that of its {len(study.trials)} trials; use another --name"
            )
        study.set_user_attr(key, value)
    _fail_dead_trials(study, folder)
    seed = search.seed + len(study.trials)  # a resumed search must not repeat its draws
    if search.sampler == "grid":
        tried = [_values(trial) for trial in study.trials if trial.state != optuna.trial.TrialState.FAIL]
        for values in grid(space):
            if values not in tried:
                study.enqueue_trial(values)
    elif search.sampler == "tpe":
        study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)
    else:
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
    return study


def _fail_dead_trials(study: optuna.Study, folder: Path) -> None:
    """Mark killed trials as failed: the storage says that they run, but no process of this machine holds their folder's lock."""
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        run_dir = trial_folder(folder, trial.number)
        if run_dir.is_dir():
            with suppress(ConfigError), run_lock(run_dir):
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def _values(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Return the drawn values, or those of a trial that waits."""
    return trial.params or trial.system_attrs.get("fixed_params", {})


def _searched(config: Config) -> dict[str, Any]:
    """Return the config's values that influence the scores: all but paths and tracking."""
    values = config.to_dict()
    values.pop("tracking")
    for key in ("runs_dir", "run_name", "copy_to"):
        values["trainer"].pop(key)
    if config.plugins:
        values["plugins"] = plugin_digests(config.plugins)
    return values


def trial_folder(folder: Path, number: int) -> Path:
    return folder / f"trial-{number:04}"


def run_trials(study: optuna.Study, search: Search, space: Sequence[Dimension], config: Config, folder: Path) -> None:
    """Draw and train trials until the study has all of them, or the time is over. folder: contains the trials' runs.

    ConfigError for a trial with an invalid config, as the space is wrong.
    """
    from refract.pipeline.data.prepare import prepare_data

    load(config.plugins)
    count = min(search.trials, len(grid(space))) if search.sampler == "grid" else search.trials
    config = with_decisions(study, config)
    prepared = prepare_data(config)
    write_config(config, folder)
    start = time.monotonic()
    while _done(study) < count and (search.minutes is None or time.monotonic() - start < 60 * search.minutes):
        trial = study.ask()
        run_dir = trial_folder(folder, trial.number)
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            with run_lock(run_dir):
                drawn = _draw(trial, space, study, search)
                values = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in drawn.items())
                score = _train(trial, drawn, config, run_dir, prepared)
        except optuna.TrialPruned as reason:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            log.info("trial %d pruned (%s): %s", trial.number, reason, values)
        except BaseException:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        else:
            study.tell(trial, score)
            log.info("trial %d scored %.4f, the best so far %.4f: %s", trial.number, score, study.best_value, values)


def with_decisions(study: optuna.Study, config: Config) -> Config:
    """Return the config with the last decision in `data.labels` of the first trial: later decisions change no trial of the study."""
    from refract.pipeline.labels.address import pinned

    if config.data.labels is None:
        return config
    if LABELS not in study.user_attrs:
        study.set_user_attr(LABELS, pinned(config.data.labels))
    return config.changed({"data.labels": study.user_attrs[LABELS]})


def best_config(study: optuna.Study, config: Config) -> dict[str, Any]:
    """Return the best trial's config. ConfigError if no trial finished."""
    try:
        drawn = study.best_trial.user_attrs["drawn"]
    except ValueError as error:
        raise ConfigError(f"no trial of {study.study_name} finished; the log above has the cause of each") from error
    return with_values(config.to_dict(), drawn)


class Pruning(Callback):
    """Report each epoch's score to Optuna, and prune a trial with low scores or an exploding loss."""

    def __init__(self, trial: optuna.Trial, monitor: str) -> None:
        self.trial, self.monitor = trial, monitor
        self._first: float | None = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach()
        # Reading the loss synchronises a GPU, so it is read only every tenth batch there.
        if self._first is None:
            self._first = max(float(loss), KNOWN)
        elif (loss.device.type == "cpu" or batch_idx % 10 == 9) and float(loss) > EXPLODED * self._first:
            raise optuna.TrialPruned(f"the loss {float(loss):.3g} exceeds {EXPLODED:g} times its first")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.trial.report(float(trainer.callback_metrics[self.monitor]), trainer.current_epoch + 1)
        if self.trial.should_prune():
            raise optuna.TrialPruned("its score is low compared with other trials")


def _train(trial: optuna.Trial, drawn: Mapping[str, Any], config: Config, run_dir: Path, prepared: Any) -> float:
    """Train a trial and return its best validation score. TrialPruned if it is pruned or its loss is not finite."""
    from refract.pipeline.tracking import Tracker
    from refract.pipeline.training.fit import assemble, fit

    trial.set_user_attr("drawn", dict(drawn))
    trial_config = config_from_dict(with_values(config.to_dict(credentials=True), drawn), where=f"trial {trial.number}")
    same_data = trial_config.data == config.data and trial_config.trainer.seed == config.trainer.seed
    assembly = assemble(trial_config, prepared if same_data else None)
    write_config(assembly.config, run_dir)
    tracker = None
    if config.tracking.enabled:
        parent = _parent(config, run_dir.parent)
        tags = origin("refract tune") | ({"mlflow.parentRunId": parent} if parent else {})
        tracker = Tracker(trial_config.tracking, run_dir, drawn, tags)
    status = "FAILED"
    try:
        history = fit(assembly, run_dir, tracker, watchers=[Pruning(trial, assembly.module.monitor)])
        status = "FINISHED"
        return max(row[assembly.module.monitor] for row in history)
    except ConfigError as error:  # a non-finite loss
        if "training stopped" not in str(error):
            raise
        raise optuna.TrialPruned("its loss is not finite") from error
    except optuna.TrialPruned:
        status = "KILLED"
        raise
    finally:
        if tracker is not None:
            tracker.finish(status)


def _parent(config: Config, folder: Path) -> str | None:
    """Return the ID of the MLflow run that is the parent of the trials' runs. The first process creates it."""
    from refract.pipeline.tracking import Tracker
    from refract.pipeline.tracking.journal import Journal

    if not Journal(folder).entries:
        tags = {"refract.search": folder.name, **origin(f"refract tune {folder.name.removeprefix('tune-')}")}
        Tracker(config.tracking, folder, config.to_dict(), tags).finish("FINISHED")
    return Journal(folder).delivered.get("run_id")


def _draw(trial: optuna.Trial, space: Sequence[Dimension], study: optuna.Study, search: Search) -> dict[str, Any]:
    fine = search.sampler == "coarse-to-fine" and trial.number >= FINE_FROM * search.trials
    best = _best(study) if fine else []
    drawn: dict[str, Any] = {}
    for dimension in space:
        if not applies(dimension, drawn):
            continue
        key = dimension.key
        if dimension.choices:
            drawn[key] = trial.suggest_categorical(key, dimension.choices)
            continue
        low, high = _narrowed(dimension, [other.params[key] for other in best if key in other.params])
        if dimension.whole:
            drawn[key] = trial.suggest_int(key, int(low), int(high), log=dimension.log)
        else:
            drawn[key] = trial.suggest_float(key, low, high, log=dimension.log)
    return drawn


def _best(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    done.sort(key=lambda trial: trial.value or 0.0, reverse=True)
    return done[: max(FEWEST_BEST, round(BEST_FRACTION * len(done)))]


def _narrowed(dimension: Dimension, values: Sequence[float]) -> tuple[float, float]:
    """Return the range of the best values; the whole range if they have fewer than two different values."""
    low, high = (min(values), max(values)) if values else (dimension.low, dimension.high)
    return (low, high) if low < high else (dimension.low, dimension.high)


def grid(space: Sequence[Dimension]) -> list[dict[str, Any]]:
    """Return all combinations, with GRID values of each numeric key. ConfigError if the space has conditions."""
    columns = []
    for dimension in space:
        if dimension.when:
            raise ConfigError(f"{dimension.key}: a grid accepts no conditions; use another --sampler")
        spread = np.geomspace if dimension.log else np.linspace
        values = list(dimension.choices) or spread(dimension.low, dimension.high, GRID).tolist()
        columns.append(sorted({round(value) for value in values}) if dimension.whole else values)
    keys = [dimension.key for dimension in space]
    return [dict(zip(keys, row, strict=True)) for row in itertools.product(*columns)]


def _done(study: optuna.Study) -> int:
    """Count the finished trials, and those that other processes run."""
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.RUNNING)
    return len(study.get_trials(deepcopy=False, states=states))


def _storage(url: str) -> Any:
    if url.startswith("journal:"):
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
    if url.startswith("postgresql://"):  # else SQLAlchemy takes psycopg 3, which Refract does not install
        url = url.replace("postgresql://", "postgresql+psycopg2://", 1)
    return optuna.storages.RDBStorage(url)
