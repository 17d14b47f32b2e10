"""The model that a training starts from: a bundle, also at a URL, a run, a version of MLflow's model registry, or a run of MLflow.

Each is a verified bundle on this machine. Independent of networks.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.pipeline.config.config import ConfigError
from refract.pipeline.config.model_weights import (
    BUNDLE,
    bundle_folder,
    check_no_hub_page,
    is_in_mlflow,
    is_remote_bundle,
)
from refract.pipeline.config.sections import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from refract.models.bundle.bundle import Bundle

FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN_ID"
DOWNLOADS = ".models"
"""The folder in `trainer.runs_dir` with the downloaded bundles, named by their digests. It can be removed when no run is unfinished."""

_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")
_MLFLOW_RUN = re.compile(r"runs:/(?P<run>[A-Za-z0-9_-]+)(/bundle)?")
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class SourceModel:
    """The model that a training starts from.

    weights: the value of model.weights that names it, with a version in place of an alias; record: `source` (model.weights as configured),
    `weights`, `digest` of the bundle, and its `name` and `version`, or its `run`, where it has them.
    """

    bundle: "Bundle"
    weights: str
    record: dict[str, str]


def source_model(
    weights: str, runs_dir: Path, tracking: TrackingConfig, digest: str | None = None
) -> SourceModel | None:
    """Return the model that `model.weights` names, verified. None if it names other weights.

    runs_dir: `trainer.runs_dir`, whose DOWNLOADS keeps a model of MLflow; tracking: where MLflow is; digest: the digest of the
    bundle that a resumed run started from; its download is then used without MLflow.
    ConfigError if the model is unknown, has no bundle, is damaged, or has another digest; TrackingError if MLflow cannot be reached.
    """
    check_no_hub_page(weights)
    if is_in_mlflow(weights):
        downloads = runs_dir / DOWNLOADS
        source = _stored(weights, downloads, digest) or _downloaded(weights, downloads, tracking)
    elif is_remote_bundle(weights):
        source = SourceModel(_verified(weights, weights), weights, {})
    elif (folder := bundle_folder(weights)) is not None:
        source = SourceModel(_verified(folder, weights), weights, {})
    else:
        return None
    bundle = source.bundle
    if digest not in (None, bundle.digest):
        raise ConfigError(
            f"--resume: model.weights: {weights} is not the model that the run started from: its digest is {bundle.digest[:12]}, "
            f"not {digest[:12]}; start a new run without --resume"
        )
    named = {"source": weights, "weights": source.weights, "name": bundle.info.name, "digest": bundle.digest}
    return SourceModel(bundle, source.weights, named | source.record)


def _verified(folder: str | Path, weights: str) -> "Bundle":
    from refract.models.bundle.bundle import BundleError, load_bundle

    try:
        return load_bundle(folder)
    except BundleError as error:
        raise ConfigError(f"model.weights: {weights} is not a bundle that can be verified: {error}") from error


def _stored(weights: str, downloads: Path, digest: str | None) -> SourceModel | None:
    """Return the earlier download of a resumed run's model; None without an intact one."""
    if digest is None or not (folder := downloads / digest[:16]).is_dir():
        return None
    try:
        return SourceModel(_verified(folder, weights), weights, {})
    except ConfigError:
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _downloaded(weights: str, downloads: Path, tracking: TrackingConfig) -> SourceModel:
    """Download the bundle from MLflow to its folder in `downloads`."""
    from refract.pipeline.tracking.address import tracking_uri

    registered, run = _REGISTERED.fullmatch(weights), _MLFLOW_RUN.fullmatch(weights)
    if registered is None and run is None:
        raise ConfigError(f"model.weights: {weights!r} is not a model of MLflow; expected {FORMS}")
    uri = tracking_uri(tracking)
    client = _client(weights, uri)
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".download-") as temporary:
        with _located_errors(weights, uri):
            if registered is not None:
                version = _version(client, registered)
                pinned, record = f"models:/{registered['name']}/{version}", {"version": version}
                folder = _fetch_version(client, registered["name"], version, temporary)
            else:
                assert run is not None
                pinned, record = weights, {"run": run["run"]}
                folder = _fetch_run(client, run["run"], temporary)
        bundle = _verified(folder, weights)
        target = downloads / bundle.digest[:16]
        if not target.is_dir():
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():  # else another process has downloaded it
                    raise
    return SourceModel(_verified(target, weights), pinned, record)


def _client(weights: str, uri: str) -> Any:
    from refract.pipeline.tracking.address import absolute, check_address, sqlite_path
    from refract.pipeline.tracking.model_registry import client_of

    uri = absolute(uri)
    check_address(uri)
    database = sqlite_path(uri)
    if database is not None and not database.is_file():  # MLflow would create an empty database
        raise ConfigError(
            f"model.weights: {weights}: there is no {database}; set tracking.uri or MLFLOW_TRACKING_URI to the "
            "address of the model's MLflow"
        )
    return client_of(uri)


def _version(client: "MlflowClient", registered: "re.Match[str]") -> str:
    name = registered["name"]
    if registered["alias"]:
        return str(client.get_model_version_by_alias(name, registered["alias"]).version)
    return str(client.get_model_version(name, str(int(registered["version"]))).version)


def _fetch_version(client: "MlflowClient", name: str, version: str, folder: str) -> Path:
    from refract.pipeline.tracking.model_registry import download

    return download(client, name, version, Path(folder))


def _fetch_run(client: "MlflowClient", run: str, folder: str) -> Path:
    client.get_run(run)
    if BUNDLE not in {artifact.path for artifact in client.list_artifacts(run)}:
        raise ConfigError(
            f"model.weights: runs:/{run}: the run has no bundle; its training may be unfinished, or it was not a training of Refract"
        )
    return Path(client.download_artifacts(run, BUNDLE, folder))


@contextmanager
def _located_errors(weights: str, uri: str) -> Iterator[None]:
    """Raise ConfigError where MLflow has no such model or run, and TrackingError for its other failures."""
    from mlflow.exceptions import MlflowException

    from refract.models.credentials import masked
    from refract.pipeline.tracking import TrackingError
    from refract.pipeline.tracking.store import first_line

    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # MLflow, and the libraries below it and its artifact stores, raise many types
        address = masked(uri)
        if isinstance(error, MlflowException) and error.error_code in _MISSING:
            what = "run" if weights.startswith("runs:") else "model, version or alias"
            raise ConfigError(
                f"model.weights: {weights}: MLflow at {address} has no such {what} ({first_line(error)}); check the name, or set "
                "tracking.uri"
            ) from error
        raise TrackingError(
            f"model.weights: {weights}: MLflow at {address} did not deliver it ({first_line(error)}); start the server, or set "
            "tracking.uri or MLFLOW_TRACKING_URI, and train again"
        ) from error
