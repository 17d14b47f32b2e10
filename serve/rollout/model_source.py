"""Resolve a model source to a bundle folder: a folder, or a version in MLflow's model registry. Independent of the bundle's content."""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from refract.cache_folder import cache_folder
from refract.models.credentials import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)


LOOK_S, LOCAL_S, STALL_S = 60, 300, 600
"""Timeouts in seconds: to look up a name on a tracking server; to look it up in a database file on a busy machine; without progress of a
download."""

LAST_USED, UNUSED_S, ABANDONED_S = 3, 30 * 86_400, 86_400
"""Most recently used versions of a model that stay in the cache; seconds that other unused versions stay; seconds that temporary files
stay."""

_T = TypeVar("_T")
_SCHEME = "models:/"
_VERSION = re.compile(r"(?P<name>.+)-[0-9]+-[0-9a-f]{12}")
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


class SourceError(ValueError):
    """The source does not refer to a model that can be served. The message says how to fix it."""


class UnreachableError(SourceError):
    """The tracking server is unreachable."""


def resolve(source: str, *, cache: Path | None = None) -> Path:
    """Return the local bundle folder of `source`, a folder, `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Each version is downloaded once, to `cache`, by default models/ in `cache_folder()`. The tracking server is MLFLOW_TRACKING_URI, or else
    mlflow.db in the working directory. SourceError if the source is invalid, unknown, unreachable or cannot be stored.
    """
    if is_registered(source):
        match = _REGISTERED.fullmatch(source)
        if match is None:
            raise SourceError(f"{source!r} is not a valid source; expected models:/NAME@ALIAS or models:/NAME/VERSION")
        return _download(source, match, cache or cache_folder() / "models")
    path = Path(source)
    if not path.is_dir():
        raise SourceError(
            f"{source}: no such folder; expected a bundle folder, models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    return path


def is_registered(source: str) -> bool:
    """Return whether the source is a registry name, not a folder."""
    return source.startswith(_SCHEME)


def resolve_in_subprocess(source: str, damaged: Path | None = None) -> Path:
    """Run `resolve` of a registered source, or `download_again`, in a subprocess. SourceError.

    MLflow takes seconds and memory to import, and its threads, if they hang, would prevent this process from exiting.
    """
    command, options = subprocess_command(source, damaged)
    completed = subprocess.run(command, stdout=subprocess.PIPE, check=False, **options)
    return parse_result(source, completed.stdout, completed.returncode)


def subprocess_command(source: str, damaged: Path | None) -> tuple[list[str], dict[str, Any]]:
    """Return (the command of `resolve_in_subprocess`, options for starting the process).

    The subprocess runs this installation, independent of the working directory, ignores Ctrl-C, and ends when this process ends.
    """
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))))
    command = [
        sys.executable,
        "-P",
        "-m",
        "refract.serve.rollout.model_source",
        source,
        *([str(damaged)] if damaged else []),
    ]
    return command, {"env": os.environ | {"PYTHONPATH": path}, "start_new_session": True}


def parse_result(source: str, out: bytes, code: int | None) -> Path:
    """Return the folder that the process of `subprocess_command` wrote to `out`. SourceError if it failed."""
    result = json.loads(out.splitlines()[-1]) if code == 0 and out.strip() else {}
    if "path" not in result:
        raise SourceError(result.get("error") or f"{source}: the lookup process failed with exit code {code}")
    return Path(result["path"])


def mark_used(folder: Path) -> None:
    """Update the folder's time of last use, which the cache clean-up reads."""
    with suppress(OSError):  # the cache may be read-only
        os.utime(folder)


def download_again(source: str, damaged: Path) -> Path:
    """Replace `damaged`, the download of a registered source, by a new download. If that fails, `damaged` stays. SourceError."""
    with _temporary_folder(damaged.parent, source) as folder:
        aside = Path(folder) / damaged.name
        try:
            damaged.rename(aside)
        except FileNotFoundError:  # another server is replacing it
            return resolve(source, cache=damaged.parent)
        try:
            return resolve(source, cache=damaged.parent)
        finally:
            if not damaged.exists():
                aside.rename(damaged)


def _download(source: str, match: re.Match[str], cache: Path) -> Path:
    tracking_uri = _tracking_uri()
    # The version that the source referred to last, for when the server is unreachable.
    last = cache / f"last-{hashlib.sha256(f'{tracking_uri} {source}'.encode()).hexdigest()[:12]}"
    try:
        version = _version(source, match, tracking_uri)
    except UnreachableError as err:
        cached = cache / last.read_text("utf-8") if last.is_file() else None
        if cached is None or not cached.is_dir():
            raise
        logger.warning("using the cached %s, the last known version of %s: %s", cached.name, source, err)
        mark_used(cached)
        return cached
    # The artifact URI contains the training run, so the same name and version on another server gets another folder.
    origin = hashlib.sha256(f"{tracking_uri}\n{version.source}".encode()).hexdigest()[:12]
    target = cache / f"{quote(version.name, safe='')}-{version.version}-{origin}"
    if not target.is_dir():
        with _temporary_folder(cache, source) as folder:
            _move(_fetch(version, folder, tracking_uri, source), target)
            mark_used(target)
            with suppress(OSError):  # another server cleans up too; the next download repeats it
                _sweep(cache, Path(folder))
    mark_used(target)
    _remember(last, target.name)
    return target


def _temporary_folder(cache: Path, source: str) -> tempfile.TemporaryDirectory[str]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # An abandoned download may still write.
        return tempfile.TemporaryDirectory(dir=cache, prefix=".download-", ignore_cleanup_errors=True)
    except OSError as err:
        raise SourceError(
            f"{source}: the download folder {cache} is not writable ({err.strerror}); make it writable"
        ) from err


def _sweep(cache: Path, aside: Path) -> None:
    """Move files of killed processes and long unused versions to `aside`, which the caller removes. The last known version of each source
    and the most recently used versions of each model stay."""
    now = time.time()
    obsolete = [
        path for kind in (".download-*", ".last-*") for path in cache.glob(kind) if _age(path, now) > ABANDONED_S
    ]
    named = {last.read_text("utf-8") for last in cache.glob("last-*") if last.is_file()}
    models: dict[str, list[Path]] = defaultdict(list)
    for folder in cache.iterdir():
        if (match := _VERSION.fullmatch(folder.name)) and folder.is_dir():
            models[match["name"]].append(folder)
    for folders in models.values():
        old = sorted(folders, key=lambda folder: _age(folder, now))[LAST_USED:]
        obsolete += [folder for folder in old if folder.name not in named and _age(folder, now) > UNUSED_S]
    for path in obsolete:
        path.rename(aside / path.name)


def _age(path: Path, now: float) -> float:
    return now - path.stat().st_mtime


def _remember(last: Path, name: str) -> None:
    """Store the version's name for later lookups. A cache that is part of a container image may be read-only, which is only logged."""
    part = last.with_name(f".{last.name}-{os.getpid()}")
    try:
        part.write_text(name, "utf-8")
        part.replace(last)
    except OSError as err:
        logger.warning(
            "%s is not writable (%s); without the tracking server this model will not be found", last, err.strerror
        )


def _tracking_uri() -> str:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    if not Path("mlflow.db").is_file():  # MLflow would create an empty database and report a missing model
        raise SourceError(f"no mlflow.db in {Path.cwd()}; set MLFLOW_TRACKING_URI to the model's tracking server")
    return "sqlite:///mlflow.db"


def _import_mlflow() -> None:
    """Import MLflow with telemetry off and short timeouts. Only the lookup's subprocess calls this: the import takes seconds."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    # By default MLflow silently tries an unreachable server 8 times, for two minutes each.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow  # noqa: F401


def _client(tracking_uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _version(source: str, match: re.Match[str], tracking_uri: str) -> "ModelVersion":
    _import_mlflow()  # outside the timeout: it takes tens of seconds on a busy machine

    def look_up() -> "ModelVersion":
        client = _client(tracking_uri)
        if match["alias"]:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])

    try:
        return _attended(look_up, LOCAL_S if tracking_uri.startswith("sqlite:") else LOOK_S)
    except Exception as err:  # MLflow's errors, or SQLAlchemy's for a database that cannot be opened
        missing = getattr(err, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
        problem = "no such model, version or alias" if missing else "the tracking server does not answer"
        kind = SourceError if missing else UnreachableError
        remedy = "check the name, or name another server by" if missing else "start it, or name another one by"
        raise kind(
            f"{source}: {problem} at {masked(tracking_uri)} ({_first_line(err)}); {remedy} MLFLOW_TRACKING_URI"
        ) from err


def _fetch(version: "ModelVersion", folder: str, tracking_uri: str, source: str) -> Path:
    from mlflow.artifacts import download_artifacts

    def download() -> Path:
        return Path(download_artifacts(artifact_uri=version.source, dst_path=folder, tracking_uri=tracking_uri))

    try:
        return _attended(download, STALL_S, lambda: _size(folder))
    except Exception as err:  # each artifact store has its own errors: MlflowException, OSError, botocore's, …
        raise SourceError(f"{source}: {masked(str(version.source))} cannot be downloaded ({_first_line(err)})") from err


def _attended(call: Callable[[], _T], seconds: float, progress: Callable[[], int] = lambda: 0) -> _T:
    """Return the result of `call`. TimeoutError if `progress()` returns the same value for `seconds`.

    MLflow waits forever for a server that sends a byte now and then. After the timeout `call` continues on a daemon thread, which does not
    prevent the process from exiting.
    """
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as err:
            result.set_exception(err)

    threading.Thread(target=run, daemon=True).start()
    last, since = progress(), time.monotonic()
    while not wait((result,), min(seconds, 1)).done:
        if (current := progress()) != last:
            last, since = current, time.monotonic()
        elif time.monotonic() - since > seconds:
            raise TimeoutError(f"no data received for {seconds:g} s")
    return result.result()


def _size(folder: str) -> int:
    size = 0
    for path in Path(folder).rglob("*"):
        with suppress(OSError):  # renamed meanwhile
            size += path.stat().st_size
    return size


def _move(downloaded: Path, target: Path) -> None:
    """Rename a complete download atomically. Another server may have stored the same version in this cache meanwhile."""
    try:
        downloaded.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _first_line(err: Exception) -> str:
    return masked((str(err).splitlines() or [type(err).__name__])[0])


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _main(source: str, damaged: str | None = None) -> None:
    """Resolve the source and write the result as JSON to standard output: the process of `subprocess_command`."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        result = {"path": str(download_again(source, Path(damaged)) if damaged else resolve(source))}
    except SourceError as err:
        result = {"error": str(err)}
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a normal exit would wait for hanging threads of MLflow


if __name__ == "__main__":
    _main(*sys.argv[1:])
