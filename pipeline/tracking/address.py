"""The address of the tracking server: which one is meant, whether it can be used at all, and how it is written for a reader."""

import os
from pathlib import Path
from urllib.parse import quote, unquote

from refract.models.credentials import MASK, masked
from refract.pipeline.config.config import ConfigError
from refract.pipeline.config.sections import TrackingConfig

DEFAULT_URI = "sqlite:///mlflow.db"
SQLITE = ("sqlite:///", "sqlite+pysqlite:///")
DATABASES = ("postgresql", "mysql", "mssql", "sqlite")
FOLDERS_ALLOWED = "MLFLOW_ALLOW_FILE_STORE"
"""MLflow's own switch for the store that it gave up."""


def tracking_uri(config: TrackingConfig) -> str:
    """The address as the config or the environment writes it. ConfigError for one without its credentials; see `with_credentials`."""
    return with_credentials(config.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI)


def absolute(uri: str) -> str:
    """A SQLite file's address that means the same in any folder."""
    path = sqlite_path(uri)
    if path is None or path.is_absolute():
        return uri
    query = uri.partition("?")[2]
    return sqlite_uri(path.resolve()) + (f"?{query}" if query else "")


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite address, None for any other address and for a database in memory."""
    scheme = next((scheme for scheme in SQLITE if uri.startswith(scheme)), None)
    name = "" if scheme is None else unquote(uri.removeprefix(scheme).partition("?")[0])
    return None if name == "" or name.startswith(":") else Path(name)


def sqlite_uri(path: Path) -> str:
    """The address of a file. SQLAlchemy decodes %XX in it and ends the name at a `?`.

    With the driver's name, MLflow does not create the folder that it reads from the encoded text.
    """
    encoded = str(path).replace("%", "%25").replace("?", "%3F")
    return f"{SQLITE[0] if encoded == str(path) else SQLITE[1]}{encoded}"


def artifact_folder(uri: str, experiment: str) -> str | None:
    """The address to create an experiment with, None for MLflow's own choice: it decodes %XX in the name of a local folder."""
    if sqlite_path(uri) is None or "%" not in str(Path.cwd()):
        return None
    return f"{Path.cwd().as_uri()}/mlruns/{quote(quote(experiment, safe=''))}"


def with_credentials(uri: str) -> str:
    """The address that works: runs keep it without credentials, and MLFLOW_TRACKING_URI may have them. ConfigError where it has not."""
    if MASK not in uri:
        return uri
    named = os.environ.get("MLFLOW_TRACKING_URI", "")
    if masked(named) == uri:
        return named
    raise ConfigError(f"tracking.uri: {uri} has no credentials here; set MLFLOW_TRACKING_URI to the whole address")


def is_local(uri: str) -> bool:
    """Whether MLflow's store is on this machine: such a store is slow at times, but never away."""
    return uri.startswith("sqlite") or uri.partition(":")[0] in (uri, "file")


def check_address(uri: str) -> None:
    """ConfigError for an address that no MLflow can use, now or later; nothing is asked over the network."""
    scheme = uri.partition("://")[0].partition("+")[0].lower() if "://" in uri else uri.partition(":")[0]
    scheme = "" if scheme == uri else scheme
    allowed = os.environ.get(FOLDERS_ALLOWED, "").lower() in ("true", "1")
    if scheme in ("", "file") and not allowed and not uri.startswith("databricks"):
        raise ConfigError(
            f"tracking.uri: {masked(uri)} is a folder, which MLflow writes to only with {FOLDERS_ALLOWED}=true; use "
            f"{DEFAULT_URI}, or move the folder's runs with `mlflow migrate-filestore`"
        )
    if scheme in DATABASES:
        _check_driver(uri)


def _check_driver(uri: str) -> None:
    """ConfigError where SQLAlchemy cannot read the address, or its driver is not installed."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ImportError, ValueError) as error:
        why = masked((str(error).splitlines() or [type(error).__name__])[0])
        raise ConfigError(f"tracking.uri: {masked(uri)} cannot be used ({why})") from error
