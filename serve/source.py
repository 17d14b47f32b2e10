"""Where a bundle comes from: a folder, or a version in MLflow's model registry. Knows nothing of its content."""

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/refract/models")

_SCHEME = "models:/"
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


class SourceError(ValueError):
    """The source names nothing that can be served. The message says what to do."""


class UnreachableError(SourceError):
    """The tracking server does not answer."""


def resolve(source: str, *, cache: Path | None = None) -> Path:
    """The local bundle folder of `source`: itself, or a download of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Downloads go to `cache`, by default ~/.cache/refract/models, once a version. The tracking server is that of
    MLFLOW_TRACKING_URI, else mlflow.db of the working directory. SourceError says what is wrong with the source.
    """
    if is_registered(source):
        match = _REGISTERED.fullmatch(source)
        if match is None:
            raise SourceError(f"{source!r} is neither models:/NAME@ALIAS nor models:/NAME/VERSION")
        return _download(source, match, (cache or CACHE).expanduser())
    path = Path(source)
    if not path.is_dir():
        raise SourceError(
            f"{source}: no such folder; expected a bundle's folder, models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    return path


def is_registered(source: str) -> bool:
    """Whether the source is a name in the registry; else it is a folder of the user's own."""
    return source.startswith(_SCHEME)


def download_again(source: str, damaged: Path) -> Path:
    """`resolve` of a registered source whose download, `damaged`, is of no use. It stays where there is no other. SourceError."""
    with _workplace(damaged.parent, source) as folder:
        aside = Path(folder) / damaged.name
        try:
            damaged.rename(aside)
        except FileNotFoundError:  # another server is about it
            return resolve(source, cache=damaged.parent)
        try:
            return resolve(source, cache=damaged.parent)
        finally:
            if not damaged.exists():
                aside.rename(damaged)


def _download(source: str, match: re.Match[str], cache: Path) -> Path:
    tracking_uri = _tracking_uri()
    # What the source meant last, for when the server is down.
    last = cache / f"last-{hashlib.sha256(f'{tracking_uri} {source}'.encode()).hexdigest()[:12]}"
    try:
        version = _version(source, match, tracking_uri)
    except UnreachableError as err:
        known = cache / last.read_text("utf-8") if last.is_file() else None
        if known is None or not known.is_dir():
            raise
        logger.warning("%s; served is what it meant last: %s", err, known.name)
        return known
    # The source names the training run, so the same name and version on another server is another folder.
    origin = hashlib.sha256(f"{tracking_uri}\n{version.source}".encode()).hexdigest()[:12]
    target = cache / f"{quote(version.name, safe='')}-{version.version}-{origin}"
    if not target.is_dir():
        with _workplace(cache, source) as folder:
            _move(_fetch(version, folder, tracking_uri, source), target)
    _remember(last, target.name)
    return target


def _workplace(cache: Path, source: str) -> tempfile.TemporaryDirectory[str]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=cache, prefix=".download-")
    except OSError as err:
        raise SourceError(f"{source}: downloads go to {cache}, which cannot be written ({err.strerror})") from err


def _remember(last: Path, name: str) -> None:
    """A cache that was baked into an image may be read-only, and serves all the same."""
    part = last.with_name(f".{last.name}-{os.getpid()}")
    try:
        part.write_text(name, "utf-8")
        part.replace(last)
    except OSError as err:
        logger.warning(
            "with the tracking server down this would not be found: %s cannot be written (%s)", last, err.strerror
        )


def _tracking_uri() -> str:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    if not Path("mlflow.db").is_file():  # MLflow would create an empty one, and then say that it has no such model
        raise SourceError(f"no mlflow.db in {Path.cwd()}; set MLFLOW_TRACKING_URI to the server that has the model")
    return "sqlite:///mlflow.db"


def _client(tracking_uri: str) -> "MlflowClient":
    """MLflow, imported here and nowhere else in this room: it takes seconds, and a server does without."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    # By default a server that is down is asked 8 times over minutes, in silence.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _version(source: str, match: re.Match[str], tracking_uri: str) -> "ModelVersion":
    try:
        client = _client(tracking_uri)
        if match["alias"]:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])
    except Exception as err:  # MLflow's own, or SQLAlchemy's for a database that cannot be opened
        known = getattr(err, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
        problem = "no such model, version or alias" if known else "the tracking server does not answer"
        kind = SourceError if known else UnreachableError
        raise kind(f"{source}: {problem} at {tracking_uri} ({_first_line(err)})") from err


def _fetch(version: "ModelVersion", folder: str, tracking_uri: str, source: str) -> Path:
    from mlflow.artifacts import download_artifacts

    try:
        return Path(download_artifacts(artifact_uri=version.source, dst_path=folder, tracking_uri=tracking_uri))
    except Exception as err:  # each artifact store raises its own: MlflowException, OSError, botocore's, …
        raise SourceError(f"{source}: {version.source} cannot be downloaded ({_first_line(err)})") from err


def _move(downloaded: Path, target: Path) -> None:
    """Give a finished download its name in one step: another server may be doing the same in this cache."""
    try:
        downloaded.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]


if __name__ == "__main__":  # for a server that follows a name: see `serve.follow`
    try:
        told = {"path": str(resolve(sys.argv[1]))}
    except SourceError as error:
        told = {"error": str(error)}
    sys.stdout.write(json.dumps(told) + "\n")
