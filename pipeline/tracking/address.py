"""The address of the tracking server: its source, its validation, and its form without credentials."""

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
"""MLflow's environment variable that allows its deprecated file store."""


def tracking_uri(config: TrackingConfig) -> str:
    """Return the address of the config or the environment. ConfigError if its credentials are missing; see `with_credentials`."""
    return with_credentials(config.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI)


def absolute(uri: str) -> str:
    """Return the address with an absolute path if it is a SQLite file's."""
    path = sqlite_path(uri)
    if path is None or path.is_absolute():
        return uri
    query = uri.partition("?")[2]
    return sqlite_uri(path.resolve()) + (f"?{query}" if query else "")


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite address; None for other addresses and for a database in memory."""
    scheme = next((scheme for scheme in SQLITE if uri.startswith(scheme)), None)
    name = "" if scheme is None else unquote(uri.removeprefix(scheme).partition("?")[0])
    return None if name == "" or name.startswith(":") else Path(name)


def sqlite_uri(path: Path) -> str:
    """Return the SQLite address of a file. SQLAlchemy decodes %XX in it and ends the name at a `?`.

    With the driver's name in the address, MLflow does not create a folder of the encoded name.
    """
    encoded = str(path).replace("%", "%25").replace("?", "%3F")
    return f"{SQLITE[0] if encoded == str(path) else SQLITE[1]}{encoded}"


def artifact_folder(uri: str, experiment: str) -> str | None:
    """Return the artifact location of a new experiment; None for MLflow's default, unless this folder's name has a `%`.

    MLflow decodes %XX in the name of a local folder, so such a name needs an encoded address.
    """
    if sqlite_path(uri) is None or "%" not in str(Path.cwd()):
        return None
    return f"{Path.cwd().as_uri()}/mlruns/{quote(quote(experiment, safe=''))}"


def with_credentials(uri: str) -> str:
    """Return the address with credentials: runs store it without, and MLFLOW_TRACKING_URI provides them. ConfigError if it does not."""
    if MASK not in uri:
        return uri
    complete = os.environ.get("MLFLOW_TRACKING_URI", "")
    if masked(complete) == uri:
        return complete
    raise ConfigError(f"tracking.uri: {uri} has no credentials here; set MLFLOW_TRACKING_URI to the whole address")


def is_local(uri: str) -> bool:
    """Whether MLflow's store is on this machine: such a store can be slow, but not unreachable."""
    return uri.startswith("sqlite") or uri.partition(":")[0] in (uri, "file")


def check_address(uri: str) -> None:
    """Raise ConfigError for an address that MLflow can never use. The check sends nothing over the network."""
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
    """Raise ConfigError if SQLAlchemy cannot parse the address, or if its driver is not installed."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ImportError, ValueError) as error:
        why = masked((str(error).splitlines() or [type(error).__name__])[0])
        raise ConfigError(f"tracking.uri: {masked(uri)} cannot be used ({why})") from error
