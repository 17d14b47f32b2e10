"""The model that a training starts from: a bundle, also at a URL, a run, a version of MLflow's model registry, or a run of MLflow.

Each is a verified bundle on this machine. Independent of networks.
"""

import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from refract.pipeline.config.config import Config, ConfigError
from refract.remote.address import is_remote

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from refract.models.bundle.bundle import Bundle

FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN_ID"
DOWNLOADS = ".models"
"""The folder in `trainer.runs_dir` with the downloaded bundles, named by their digests. It can be removed when no run is unfinished."""

BUNDLE, RECORD = "bundle", "bundle.json"

_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")
_MLFLOW_RUN = re.compile(r"runs:/(?P<run>[A-Za-z0-9_-]+)(/bundle)?")
_HUB_PAGE = re.compile(r"https?://huggingface\.co/([^/]+/[^/]+)/?")
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


def names_model(weights: str) -> bool:
    """Whether model.weights names a model: its head has labels, and its batch norms have statistics of a training of Refract."""
    return _is_in_mlflow(weights) or is_remote_bundle(weights) or bundle_folder(weights) is not None


def is_remote_bundle(weights: str) -> bool:
    """Whether model.weights is the URL of a bundle: of a folder that is not on the Hugging Face Hub, whose repositories have weights.

    On a web server, only a name without a suffix can be a folder.
    """
    from refract.models.pretrained.weights_files import SUFFIXES, is_on_hub, is_web

    if not is_remote(weights) or is_on_hub(weights):
        return False
    name = PurePosixPath(urlsplit(weights).path)
    return not name.suffix if is_web(weights) else name.suffix not in SUFFIXES


def check_no_hub_page(weights: str) -> None:
    """Raise ConfigError if model.weights is the address of a repository's page on the Hugging Face Hub."""
    if (page := _HUB_PAGE.fullmatch(weights)) is not None:
        raise ConfigError(f"model.weights: {weights} is a page of the Hugging Face Hub; write hf://{page[1]}")


def bundle_folder(weights: str) -> Path | None:
    """Return the bundle's folder if model.weights is the folder of a bundle or of a run; else None."""
    if weights in ("none", "default") or _is_in_mlflow(weights):
        return None
    candidates = (Path(weights), Path(weights) / BUNDLE)
    return next((folder for folder in candidates if (folder / RECORD).is_file()), None)


def source_model(config: Config, digest: str | None = None) -> SourceModel | None:
    """Return the model that `model.weights` names, verified. None if it names other weights.

    digest: the digest of the bundle that a resumed run started from; its download is then used without MLflow.
    ConfigError if the model is unknown, has no bundle, is damaged, or has another digest; TrackingError if MLflow cannot be reached.
    """
    weights = config.model.weights
    if _is_in_mlflow(weights):
        source = _stored(config, digest) or _downloaded(config)
    elif is_remote_bundle(weights):
        check_no_hub_page(weights)
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


def _is_in_mlflow(weights: str) -> bool:
    return weights.startswith(("models:", "runs:"))


def _verified(folder: str | Path, weights: str) -> "Bundle":
    from refract.models.bundle.bundle import BundleError, load_bundle

    try:
        return load_bundle(folder)
    except BundleError as error:
        raise ConfigError(f"model.weights: {weights} is not a bundle that can be verified: {error}") from error


def _stored(config: Config, digest: str | None) -> SourceModel | None:
    """Return the earlier download of a resumed run's model; None without an intact one."""
    if digest is None or not (folder := _downloads(config) / digest[:16]).is_dir():
        return None
    try:
        return SourceModel(_verified(folder, config.model.weights), config.model.weights, {})
    except ConfigError:
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _downloads(config: Config) -> Path:
    return Path(config.trainer.runs_dir) / DOWNLOADS


def _downloaded(config: Config) -> SourceModel:
    """Download the bundle from MLflow to its folder in `trainer.runs_dir`."""
    weights = config.model.weights
    registered, run = _REGISTERED.fullmatch(weights), _MLFLOW_RUN.fullmatch(weights)
    if registered is None and run is None:
        raise ConfigError(f"model.weights: {weights!r} is not a model of MLflow; expected {FORMS}")
    client = _client(config)
    downloads = _downloads(config)
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".download-") as temporary:
        if registered is not None:
            version = _asked(config, lambda: _version(client, registered))
            pinned, record = f"models:/{registered['name']}/{version}", {"version": version}
            folder = _asked(config, lambda: _fetch_version(client, registered["name"], version, temporary))
        else:
            assert run is not None
            pinned, record = weights, {"run": run["run"]}
            folder = _asked(config, lambda: _fetch_run(client, run["run"], temporary))
        bundle = _verified(folder, weights)
        target = downloads / bundle.digest[:16]
        if not target.is_dir():
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():  # else another process has downloaded it
                    raise
    return SourceModel(_verified(target, weights), pinned, record)


def _client(config: Config) -> Any:
    from refract.pipeline.tracking.address import absolute, check_address, sqlite_path, tracking_uri
    from refract.pipeline.tracking.model_registry import client_of

    uri = absolute(tracking_uri(config.tracking))
    check_address(uri)
    database = sqlite_path(uri)
    if database is not None and not database.is_file():  # MLflow would create an empty database
        raise ConfigError(
            f"model.weights: {config.model.weights}: there is no {database}; set tracking.uri or MLFLOW_TRACKING_URI to the "
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


def _asked(config: Config, call: Callable[[], Any]) -> Any:
    """Return the result of a call of MLflow. ConfigError if MLflow has no such model or run; TrackingError for other failures."""
    from mlflow.exceptions import MlflowException

    from refract.models.credentials import masked
    from refract.pipeline.tracking import TrackingError
    from refract.pipeline.tracking.address import tracking_uri
    from refract.pipeline.tracking.store import first_line

    try:
        return call()
    except ConfigError:
        raise
    except Exception as error:  # MLflow, and the libraries below it and its artifact stores, raise many types
        weights, address = config.model.weights, masked(tracking_uri(config.tracking))
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
