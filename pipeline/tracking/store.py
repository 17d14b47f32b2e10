"""Deliver a journal's entries to MLflow. Delivery is idempotent, so that an interrupted one can be repeated."""

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.models.credentials import masked
from refract.pipeline.tracking.address import artifact_folder, check_address, with_credentials
from refract.pipeline.tracking.aliases import FIRST, name_version, of_model
from refract.pipeline.tracking.database import make_database
from refract.pipeline.tracking.journal import Entry

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

KEY = "refract.key"
"""The tag that identifies a run after the response to its creation was lost."""

LOGGED_MODELS = "mlflow.log-model.history"
"""The tag by which MLflow's pages show that a folder of a run is a model."""

LONGEST = 6000
"""The longest value of a parameter, in characters, that all of MLflow's stores accept."""

LONGEST_TAG = 5000
"""The longest value of a tag, in characters."""


class Refused(RuntimeError):
    """The server rejected the entry permanently. The message is the server's."""


class Store:
    """MLflow at `uri`. The client is created at the first delivery."""

    def __init__(self, uri: str, run_dir: Path) -> None:
        """ConfigError for an address that MLflow cannot use, or that lacks its credentials."""
        self.uri, self.run_dir = with_credentials(uri), run_dir
        check_address(self.uri)

    @property
    def address(self) -> str:
        """The address without credentials, for messages."""
        return masked(self.uri)

    @cached_property
    def _client(self) -> "MlflowClient":
        from mlflow import MlflowClient

        make_database(self.uri)
        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def deliver(self, entry: Entry, known: Mapping[str, Any]) -> dict[str, Any]:
        """Send an entry and return the results to store. known: the results of earlier entries.

        Refused if the server rejects the entry; other exceptions of MLflow if the server is unreachable or the database busy.
        """
        from mlflow.exceptions import MlflowException

        _ = self._client  # an error while it is created is not the server's response to the entry
        try:
            results: dict[str, Any] = getattr(self, f"_{entry['do']}")(entry, known) or {}
            return results
        except MlflowException as error:
            if error.error_code in _FINAL or type(error).__name__.startswith("Unsupported"):
                raise Refused(first_line(error)) from error
            raise

    def _start(self, entry: Entry, known: Mapping[str, Any]) -> dict[str, Any]:
        from mlflow.entities import Param, RunTag

        stored = self._client.get_experiment_by_name(entry["experiment"])
        kind = {
            "mlflow.experimentKind": "custom_model_development"
        }  # MLflow then shows the experiment's page for training
        experiment = stored.experiment_id if stored else self._create_experiment(entry["experiment"], kind)
        runs = self._client.search_runs([experiment], f"tags.`{KEY}` = '{entry['key']}'", max_results=1)
        if runs:
            run = runs[0]
        else:
            run_tags = {**entry["tags"], KEY: entry["key"]}
            run = self._client.create_run(
                experiment, start_time=entry["time"], tags=run_tags, run_name=entry["run_name"]
            )
        params = [Param(name, str(value)[:LONGEST]) for name, value in _flat(entry["params"])]
        tags = [RunTag(name, str(value)) for name, value in entry["tags"].items()]
        self._client.log_batch(run.info.run_id, params=params, tags=tags)
        if "data.fingerprint" in entry["tags"]:
            self._client.log_inputs(run.info.run_id, [_dataset(entry["tags"])])
        return {"run_id": run.info.run_id, "experiment_id": experiment, "artifacts": run.info.artifact_uri}

    def _create_experiment(self, name: str, tags: Mapping[str, str]) -> str:
        """Create the experiment. Another training may create it at the same time."""
        from mlflow.exceptions import MlflowException

        try:
            location = artifact_folder(self.uri, name)
            return str(self._client.create_experiment(name, artifact_location=location, tags=dict(tags)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or not (
                experiment := self._client.get_experiment_by_name(name)
            ):
                raise
            return str(experiment.experiment_id)

    def _metrics(self, entry: Entry, known: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        # MLflow keeps a metric of one name, step, time and value once.
        metrics = [Metric(name, value, entry["time"], entry["step"]) for name, value in entry["values"].items()]
        self._client.log_batch(known["run_id"], metrics=metrics)

    def _tags(self, entry: Entry, known: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(name, value[:LONGEST_TAG]) for name, value in entry["tags"].items()]
        self._client.log_batch(known["run_id"], tags=tags)

    def _files(self, entry: Entry, known: Mapping[str, Any]) -> None:
        for name in entry["files"]:
            self._client.log_artifact(known["run_id"], str(self.run_dir / name))
        for name in entry.get("folders", ()):
            self._client.log_artifacts(known["run_id"], str(self.run_dir / name), name)
        if entry["bundle"] is not None:
            bundle = self.run_dir / entry["bundle"]
            self._client.log_artifacts(known["run_id"], str(bundle), "bundle")
            self._log_model_files(bundle, known["run_id"])

    def _log_model_files(self, bundle: Path, run_id: str) -> None:
        """Add the files that make the bundle an MLflow model. For a damaged bundle, log a warning."""
        from refract.models.bundle.info import BundleError
        from refract.pipeline.tracking.mlflow_model import write_model_files

        with tempfile.TemporaryDirectory() as folder:
            try:
                description = write_model_files(bundle, Path(folder), run_id)
            except BundleError as error:
                log.warning("MLflow cannot load the bundle: %s", error)
                return
            self._client.log_artifacts(run_id, folder, "bundle")
        self._client.set_tag(run_id, LOGGED_MODELS, json.dumps([description]))

    def _register(self, entry: Entry, known: Mapping[str, Any]) -> dict[str, Any]:
        """Register the run's `bundle` as a version of the model, and set its alias.

        A repeated delivery finds the version by its run. Returns `version`, and what `name_version` returns.
        """
        model, run_id = entry["model"], known["run_id"]
        self._create_model(model)
        registered = [v for v in self._client.search_model_versions(of_model(model)) if v.run_id == run_id]
        if not registered:
            source = f"{known['artifacts']}/bundle"
            tags = {name: value[:LONGEST_TAG] for name, value in entry.get("tags", {}).items()}
            description = entry.get("description") or None
            registered = [
                self._client.create_model_version(
                    model, source=source, run_id=run_id, tags={**tags, FIRST: entry["alias"]}, description=description
                )
            ]
        version = str(registered[0].version)
        return {"version": version} | name_version(self._client, model, version, first=entry["alias"])

    def _create_model(self, model: str) -> None:
        """Create the registered model unless it exists. Another training may create it at the same time."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            try:
                self._client.create_registered_model(model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def _status(self, entry: Entry, known: Mapping[str, Any]) -> None:
        if entry["status"] == "RUNNING":
            self._client.update_run(known["run_id"], status="RUNNING")
        else:
            self._client.set_terminated(known["run_id"], entry["status"], entry["time"])


def _dataset(tags: Mapping[str, str]) -> Any:
    """Build MLflow's dataset entry from the tags."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = tags["data.source"]
    identity = {"name": Path(source).stem[:500] or "data", "digest": tags["data.fingerprint"][:36]}
    counts = {key.removeprefix("data."): value for key, value in tags.items() if key.startswith("data.")}
    dataset = Dataset(**identity, source_type="local", source=source, profile=json.dumps(counts))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


_FINAL = ("INVALID_PARAMETER_VALUE", "INVALID_STATE", "PERMISSION_DENIED", "UNAUTHENTICATED", "BAD_REQUEST")


def now() -> int:
    """Return the time in milliseconds since 1970, as MLflow expects."""
    return int(time.time() * 1000)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without credentials."""
    return masked((str(error).splitlines() or [type(error).__name__])[0])[:300]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
