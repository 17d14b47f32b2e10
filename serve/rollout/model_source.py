"""Where a bundle comes from: a folder, or a version in MLflow's model registry. Knows nothing of its content."""

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

from refract.models.credentials import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/refract/models")

LOOK_S, LOCAL_S, STALL_S = 60, 300, 600
"""For the tracking server to tell what a name means; for a database file, which needs no network, on a busy machine; for more of a download
to arrive."""

LAST_USED, UNUSED_S, ABANDONED_S = 3, 30 * 86_400, 86_400
"""Versions of a model that stay in the cache, and how long others do; how long what a process works at does."""

_T = TypeVar("_T")
_SCHEME = "models:/"
_VERSION = re.compile(r"(?P<name>.+)-[0-9]+-[0-9a-f]{12}")
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


def located(source: str, damaged: Path | None = None) -> Path:
    """`resolve` of a registered source, or `download_again`, in a process of its own: MLflow takes seconds and memory to import, and its
    threads, where they hang, would keep this process from ending. SourceError."""
    command, options = elsewhere(source, damaged)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, **options)
    return answer(source, done.stdout, done.returncode)


def elsewhere(source: str, damaged: Path | None) -> tuple[list[str], dict[str, Any]]:
    """(the command of `located`, options for who starts the process). It runs this code, whatever the working directory holds, hears no
    Ctrl-C and ends when this process has."""
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


def answer(source: str, out: bytes, code: int | None) -> Path:
    """What the process of `elsewhere` found. SourceError."""
    found = json.loads(out.splitlines()[-1]) if code == 0 and out.strip() else {}
    if "path" not in found:
        raise SourceError(found.get("error") or f"{source}: to look it up ended with exit code {code}")
    return Path(found["path"])


def mark_used(folder: Path) -> None:
    """So that the cache keeps it."""
    with suppress(OSError):  # of a cache that is read-only
        os.utime(folder)


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
        logger.warning("served is %s, which %s meant last: %s", known.name, source, err)
        mark_used(known)
        return known
    # The source names the training run, so the same name and version on another server is another folder.
    origin = hashlib.sha256(f"{tracking_uri}\n{version.source}".encode()).hexdigest()[:12]
    target = cache / f"{quote(version.name, safe='')}-{version.version}-{origin}"
    if not target.is_dir():
        with _workplace(cache, source) as folder:
            _move(_fetch(version, folder, tracking_uri, source), target)
            mark_used(target)
            with suppress(OSError):  # another server is sweeping too: the next download does the rest
                _sweep(cache, Path(folder))
    mark_used(target)
    _remember(last, target.name)
    return target


def _workplace(cache: Path, source: str) -> tempfile.TemporaryDirectory[str]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # A download that was given up may still write.
        return tempfile.TemporaryDirectory(dir=cache, prefix=".download-", ignore_cleanup_errors=True)
    except OSError as err:
        raise SourceError(f"{source}: downloads go to {cache}, which cannot be written ({err.strerror})") from err


def _sweep(cache: Path, aside: Path) -> None:
    """Into `aside`, whose owner removes it: what killed processes left, and versions that no server has asked for in a long time. What a
    name meant last stays, and of each model the versions used last."""
    now = time.time()
    rubbish = [
        left for kind in (".download-*", ".last-*") for left in cache.glob(kind) if _age(left, now) > ABANDONED_S
    ]
    named = {last.read_text("utf-8") for last in cache.glob("last-*") if last.is_file()}
    models: dict[str, list[Path]] = defaultdict(list)
    for folder in cache.iterdir():
        if (match := _VERSION.fullmatch(folder.name)) and folder.is_dir():
            models[match["name"]].append(folder)
    for folders in models.values():
        old = sorted(folders, key=lambda folder: _age(folder, now))[LAST_USED:]
        rubbish += [folder for folder in old if folder.name not in named and _age(folder, now) > UNUSED_S]
    for path in rubbish:
        path.rename(aside / path.name)


def _age(path: Path, now: float) -> float:
    return now - path.stat().st_mtime


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


def _import_mlflow() -> None:
    """MLflow, imported here and nowhere else in this package: it takes seconds, and a server does without."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    # By default a server that is down is asked 8 times, and each time for two minutes, in silence.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow  # noqa: F401


def _client(tracking_uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _version(source: str, match: re.Match[str], tracking_uri: str) -> "ModelVersion":
    _import_mlflow()  # which takes tens of seconds on a busy machine, and no server's time

    def ask() -> "ModelVersion":
        client = _client(tracking_uri)
        if match["alias"]:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])

    try:
        return _attended(ask, LOCAL_S if tracking_uri.startswith("sqlite:") else LOOK_S)
    except Exception as err:  # MLflow's own, or SQLAlchemy's for a database that cannot be opened
        known = getattr(err, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
        problem = "no such model, version or alias" if known else "the tracking server does not answer"
        kind = SourceError if known else UnreachableError
        raise kind(f"{source}: {problem} at {masked(tracking_uri)} ({_first_line(err)})") from err


def _fetch(version: "ModelVersion", folder: str, tracking_uri: str, source: str) -> Path:
    from mlflow.artifacts import download_artifacts

    def download() -> Path:
        return Path(download_artifacts(artifact_uri=version.source, dst_path=folder, tracking_uri=tracking_uri))

    try:
        return _attended(download, STALL_S, lambda: _size(folder))
    except Exception as err:  # each artifact store raises its own: MlflowException, OSError, botocore's, …
        raise SourceError(f"{source}: {masked(str(version.source))} cannot be downloaded ({_first_line(err)})") from err


def _attended(call: Callable[[], _T], seconds: float, progress: Callable[[], int] = lambda: 0) -> _T:
    """What `call` gives. TimeoutError where `progress()` tells the same for `seconds`: MLflow waits without end for a server that sends a
    byte now and then. `call` then goes on, on a thread that keeps no process from ending."""
    found: Future[_T] = Future()

    def run() -> None:
        try:
            found.set_result(call())
        except BaseException as err:
            found.set_exception(err)

    threading.Thread(target=run, daemon=True).start()
    seen, since = progress(), time.monotonic()
    while not wait((found,), min(seconds, 1)).done:
        if (now := progress()) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > seconds:
            raise TimeoutError(f"nothing has come for {seconds:g} s")
    return found.result()


def _size(folder: str) -> int:
    size = 0
    for path in Path(folder).rglob("*"):
        with suppress(OSError):  # renamed since
            size += path.stat().st_size
    return size


def _move(downloaded: Path, target: Path) -> None:
    """Give a finished download its name in one step: another server may be doing the same in this cache."""
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
    """See `elsewhere`."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        told = {"path": str(download_again(source, Path(damaged)) if damaged else resolve(source))}
    except SourceError as err:
        told = {"error": str(err)}
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    os._exit(0)  # threads of MLflow that hang would be waited for


if __name__ == "__main__":
    _main(*sys.argv[1:])
