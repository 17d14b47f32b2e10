"""MLflow: one run a training, with parameters, metrics, files, and the bundle as a registered model version."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import TrackingConfig

log = logging.getLogger(__name__)

DEFAULT_URI = "sqlite:///mlflow.db"


class TrackingError(RuntimeError):
    """The tracking server cannot be used; the message says which and what to do."""


class _StoreError(RuntimeError):
    """MLflow's database could not be opened; the message is its own."""


def _connected(connect: Callable[[], Any], attempts: int = 5) -> Any:
    """`connect()`, again after a moment where the database fails: two first runs that both create its tables trip over each other."""
    for attempt in range(1, attempts + 1):
        try:
            client = connect()
            client.search_experiments(max_results=1)  # opens the database
            return client
        except Exception as error:
            # MLflow lets its database layers' own errors through.
            if type(error).__module__.partition(".")[0] not in ("alembic", "sqlalchemy", "sqlite3"):
                raise
            if attempt == attempts:
                raise _StoreError(_first_line(error)) from error
            time.sleep(attempt)
    raise AssertionError("unreachable")


class Tracker:
    """One MLflow run."""

    def __init__(self, uri: str, experiment: str, run_name: str, params: Mapping[str, Any]) -> None:
        """Open a run and log the parameters (nested mappings become dotted names). TrackingError if the server does not answer."""
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        self.uri = uri
        try:
            self._client = _connected(lambda: MlflowClient(tracking_uri=uri, registry_uri=uri))
            found = self._client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
            run = self._client.create_run(experiment_id, run_name=run_name)
        except (MlflowException, OSError, _StoreError) as error:
            raise TrackingError(
                f"MLflow at {uri} cannot be used: {_first_line(error)}. Set tracking.uri or "
                "MLFLOW_TRACKING_URI, or train with --tracking.enabled false."
            ) from error
        self.run_id, self.experiment_id, self._artifacts = run.info.run_id, experiment_id, run.info.artifact_uri
        self._client.log_batch(self.run_id, params=[Param(name, str(value)) for name, value in _flat(params)])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """A server that fails now costs the metrics, not the training: a warning tells which."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now = int(time.time() * 1000)
        try:
            self._client.log_batch(
                self.run_id, metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()]
            )
        except MlflowException as error:
            log.warning("MLflow did not take the metrics of step %d: %s", step, _first_line(error))

    def log_files(self, files: Sequence[Path], bundle: Path) -> None:
        """Files, and the bundle's folder as `bundle`, as artifacts. TrackingError if the server does not take them."""
        from mlflow.exceptions import MlflowException

        try:
            for path in files:
                self._client.log_artifact(self.run_id, str(path))
            self._client.log_artifacts(self.run_id, str(bundle), "bundle")
        except (MlflowException, OSError) as error:
            raise TrackingError(
                f"MLflow at {self.uri} did not take the files; they are safe in {bundle.parent}: {_first_line(error)}"
            ) from error

    def register(self, model_name: str, alias: str) -> str:
        """Make the run's `bundle` folder a new version of the registered model and move the alias to it. Returns the version."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_registered_model(model_name)
        except MlflowException:
            self._client.create_registered_model(model_name)
        version = self._client.create_model_version(model_name, source=f"{self._artifacts}/bundle", run_id=self.run_id)
        self._client.set_registered_model_alias(model_name, alias, version.version)
        return str(version.version)

    def finish(self, status: str) -> None:
        """status: FINISHED, FAILED or KILLED."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.set_terminated(self.run_id, status)
        except MlflowException as error:
            log.warning("MLflow still shows run %s as running: %s", self.run_id, _first_line(error))


@contextmanager
def track(config: TrackingConfig, run_name: str, params: Mapping[str, Any]) -> Iterator[Tracker | None]:
    """A Tracker whose run ends as the block ends: finished, failed or (Ctrl-C) killed. None where tracking is off."""
    if not config.enabled:
        yield None
        return
    tracker = Tracker(tracking_uri(config), config.experiment, run_name, params)
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def tracking_uri(config: TrackingConfig) -> str:
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
