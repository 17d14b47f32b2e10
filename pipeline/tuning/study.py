"""The search itself: trials drawn by Optuna, each a training on its own, pruned where it lags behind, kept in a storage."""

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

import lightning
import numpy as np
import optuna
from lightning.pytorch.callbacks import Callback

from refract.models.credentials import masked
from refract.pipeline.config.config import Config, ConfigError, config_from_dict
from refract.pipeline.training.provenance import origin
from refract.pipeline.training.run_directory import held, write_config
from refract.pipeline.tuning.space import Dimension, applies, with_values

log = logging.getLogger(__name__)

SAMPLERS = ("tpe", "random", "grid", "coarse-to-fine")
GRID = 4
"""Values of a number in a grid."""
FINE_FROM = 0.5
"""Share of the trials after which coarse-to-fine narrows its ranges to those of the best."""
BEST_SHARE, FEWEST_BEST = 0.25, 3
EXPLODED = 3.0
KNOWN = 0.7
"""The loss of a coin's guess, about: a first loss below it is of weights that know the answers, and one batch says little of it."""
"""Times the first loss at which a trial is given up."""


@dataclass(frozen=True)
class Search:
    """trials: how many in all, of all processes and restarts; minutes: after which none is begun, None for no end; storage: of Optuna."""

    name: str
    sampler: str
    trials: int
    minutes: float | None
    storage: str
    seed: int


def open_study(search: Search, space: Sequence[Dimension], config: Config, folder: Path) -> optuna.Study:
    """The study of that name, begun or gone on with. ConfigError where the storage cannot be used, the sampler with the space, or where the
    study was of another space or config."""
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
    except Exception as error:  # of the database's own libraries, in many kinds
        raise ConfigError(
            masked(f"--storage: {search.storage} cannot be used: {str(error).splitlines()[0]}")
        ) from error
    told = {"space": repr(space), "config": json.dumps(_searched(config), sort_keys=True)}
    for what, value in told.items():
        if study.user_attrs.setdefault(what, value) != value:
            raise ConfigError(
                f"the {what} of the search {search.name} is not that of its {len(study.trials)} trials; give it another --name"
            )
        study.set_user_attr(what, value)
    _give_up_dead(study, folder)
    seed = search.seed + len(study.trials)  # a search that goes on does not draw the same again
    if search.sampler == "grid":
        gone = [_values(trial) for trial in study.trials if trial.state != optuna.trial.TrialState.FAIL]
        for values in grid(space):
            if values not in gone:
                study.enqueue_trial(values)
    elif search.sampler == "tpe":
        study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)
    else:
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
    return study


def _give_up_dead(study: optuna.Study, folder: Path) -> None:
    """Trials that run by the storage, but whose folder nobody holds on this machine, were killed: they count as failed."""
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        own = trial_folder(folder, trial.number)
        if own.is_dir():
            with suppress(ConfigError), held(own):
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def _values(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Drawn, or waiting to be."""
    return trial.params or trial.system_attrs.get("fixed_params", {})


def _searched(config: Config) -> dict[str, Any]:
    """What decides about the scores: without places and tracking."""
    values = config.to_dict()
    values.pop("tracking")
    for key in ("runs_dir", "run_name"):
        values["trainer"].pop(key)
    return values


def trial_folder(folder: Path, number: int) -> Path:
    return folder / f"trial-{number:04}"


def run_trials(study: optuna.Study, search: Search, space: Sequence[Dimension], config: Config, folder: Path) -> None:
    """Draw and train until the study has its trials or the time is over. folder: the trials' runs lie below it.

    ConfigError for a trial whose config cannot be, once: the space is wrong then.
    """
    from refract.pipeline.data.prepare import prepare_data

    wanted = min(search.trials, len(grid(space))) if search.sampler == "grid" else search.trials
    prepared = prepare_data(config)
    write_config(config, folder)
    began = time.monotonic()
    while _done(study) < wanted and (search.minutes is None or time.monotonic() - began < 60 * search.minutes):
        trial = study.ask()
        run_dir = trial_folder(folder, trial.number)
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            with held(run_dir):
                drawn = _draw(trial, space, study, search)
                told = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in drawn.items())
                score = _train(trial, drawn, config, run_dir, prepared)
        except optuna.TrialPruned as reason:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            log.info("trial %d pruned (%s): %s", trial.number, reason, told)
        except BaseException:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        else:
            study.tell(trial, score)
            log.info("trial %d scored %.4f, the best so far %.4f: %s", trial.number, score, study.best_value, told)


def best_config(study: optuna.Study, config: Config) -> dict[str, Any]:
    """The winning trial's config. ConfigError where no trial came to its end."""
    try:
        drawn = study.best_trial.user_attrs["drawn"]
    except ValueError as error:
        raise ConfigError(f"no trial of {study.study_name} came to its end") from error
    return with_values(config.to_dict(), drawn)


class Pruning(Callback):
    """Tell Optuna the score of each epoch, and end a trial that lags behind or whose loss explodes."""

    def __init__(self, trial: optuna.Trial, monitor: str) -> None:
        self.trial, self.monitor = trial, monitor
        self._first: float | None = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach()
        # To look at it would stop a GPU: there it is done now and then.
        if self._first is None:
            self._first = max(float(loss), KNOWN)
        elif (loss.device.type == "cpu" or batch_idx % 10 == 9) and float(loss) > EXPLODED * self._first:
            raise optuna.TrialPruned(f"the loss {float(loss):.3g} is over {EXPLODED:g} times its first")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.trial.report(float(trainer.callback_metrics[self.monitor]), trainer.current_epoch + 1)
        if self.trial.should_prune():
            raise optuna.TrialPruned("it lags behind the others")


def _train(trial: optuna.Trial, drawn: Mapping[str, Any], config: Config, run_dir: Path, prepared: Any) -> float:
    """The best score on validation. TrialPruned."""
    from refract.pipeline.tracking import Tracker
    from refract.pipeline.training.fit import assemble, fit

    trial.set_user_attr("drawn", dict(drawn))
    own = config_from_dict(with_values(config.to_dict(credentials=True), drawn), where=f"trial {trial.number}")
    same = own.data == config.data and own.trainer.seed == config.trainer.seed
    made = assemble(own, prepared if same else None)
    write_config(own, run_dir)
    tracker = None
    if config.tracking.enabled:
        parent = _parent(config, run_dir.parent)
        tags = origin("refract tune") | ({"mlflow.parentRunId": parent} if parent else {})
        tracker = Tracker(own.tracking, run_dir, drawn, tags)
    status = "FAILED"
    try:
        history = fit(made, own, run_dir, tracker, watchers=[Pruning(trial, made.module.monitor)])
        status = "FINISHED"
        return max(row[made.module.monitor] for row in history)
    except ConfigError as error:  # a loss that is no number
        if "training stopped" not in str(error):
            raise
        raise optuna.TrialPruned("its loss is no number") from error
    except optuna.TrialPruned:
        status = "KILLED"
        raise
    finally:
        if tracker is not None:
            tracker.finish(status)


def _parent(config: Config, folder: Path) -> str | None:
    """The MLflow run that holds those of the trials; made by the first process."""
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
        low, high = _narrowed(dimension, [found.params[key] for found in best if key in found.params])
        if dimension.whole:
            drawn[key] = trial.suggest_int(key, int(low), int(high), log=dimension.log)
        else:
            drawn[key] = trial.suggest_float(key, low, high, log=dimension.log)
    return drawn


def _best(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    done.sort(key=lambda trial: trial.value or 0.0, reverse=True)
    return done[: max(FEWEST_BEST, round(BEST_SHARE * len(done)))]


def _narrowed(dimension: Dimension, values: Sequence[float]) -> tuple[float, float]:
    """From the lowest to the highest of the best values; the whole range where these are one or none."""
    low, high = (min(values), max(values)) if values else (dimension.low, dimension.high)
    return (low, high) if low < high else (dimension.low, dimension.high)


def grid(space: Sequence[Dimension]) -> list[dict[str, Any]]:
    """All combinations, of a number GRID values. ConfigError where the space has conditions."""
    columns = []
    for dimension in space:
        if dimension.when:
            raise ConfigError(f"{dimension.key}: a grid has no conditions; take another sampler")
        spread = np.geomspace if dimension.log else np.linspace
        values = list(dimension.choices) or spread(dimension.low, dimension.high, GRID).tolist()
        columns.append(sorted({round(value) for value in values}) if dimension.whole else values)
    keys = [dimension.key for dimension in space]
    return [dict(zip(keys, row, strict=True)) for row in itertools.product(*columns)]


def _done(study: optuna.Study) -> int:
    """Trials that came to an end, or are under way elsewhere."""
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.RUNNING)
    return len(study.get_trials(deepcopy=False, states=states))


def _storage(url: str) -> Any:
    if url.startswith("journal:"):
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
    return optuna.storages.RDBStorage(url)
