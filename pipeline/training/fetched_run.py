"""Runs that are downloaded from their copies (`run_copy.py`), to resume them."""

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from refract.models.credentials import masked
from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.config.plugin_files import FOLDER
from refract.pipeline.tracking.journal import DELIVERED
from refract.pipeline.training.fit import CHECKPOINTS
from refract.pipeline.training.run_copy import RunCopy
from refract.pipeline.training.run_directory import CONFIG, RECORD, run_lock, unfinished, write_config
from refract.pipeline.training.run_files import BUNDLE, Uploaded, order, parsed_record, write_uploaded
from refract.remote import client
from refract.remote.address import checked, is_object_store, is_remote
from refract.remote.folders import MANIFEST, download
from refract.remote.store import RemoteObject

log = logging.getLogger(__name__)


def fetch(url: str, runs_dir: Path) -> Path:
    """Download the copy of a run to its folder in `runs_dir`, to resume it there. The folder of the same run is brought up to date.

    RemoteError if the copy cannot be read. ConfigError if there is none, if it is finished, or if the folder is that of another run.
    """
    if not is_object_store(url):
        raise ConfigError(
            f"--resume: {masked(url)}: copies of runs are at s3://, gs:// and az://, as s3://BUCKET/runs/NAME"
        )
    url = checked(url)
    path = runs_dir / url.rpartition("/")[2]
    items = _complete_items(RunCopy(path, url.rpartition("/")[0]).items())
    if RECORD not in items:
        raise ConfigError(f"--resume: {url} is not a run: it has no {RECORD}; name the folder of a run's copy")
    if path.exists():
        up_to_date(path, url)
        if parsed_record(path, (path / RECORD).read_bytes()).get("finished"):
            raise ConfigError(
                f"--resume: {path} is finished already; `refract sync {path}` completes its copy, if that is not"
            )
        return path
    if parsed_record(url, client.read(items[RECORD])).get("finished"):
        raise ConfigError(f"--resume: {url} is finished already; its bundle is {url}/{BUNDLE}")
    runs_dir.mkdir(parents=True, exist_ok=True)
    _download(url, items, path)
    _write_downloaded(path, url, items)
    return path


def up_to_date(path: Path, url: str) -> None:
    """Download the copy of a run into its folder if another machine has continued it.

    Files that the copy lacks stay, except older checkpoints. RemoteError; ConfigError if the copy is another run's; RunLocked if the run
    is being trained.
    """
    copy = RunCopy(path, url.rpartition("/")[0])
    items = copy.items()
    copy.check_same(items)
    if not copy.is_ahead(items):
        return
    log.info("another machine has continued %s", url)
    items = _complete_items(items)
    with run_lock(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        downloaded = Path(temporary) / path.name
        _download(url, items, downloaded)
        for name in sorted(items, key=order):  # as the copy, the folder is valid at any moment
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (downloaded / name).replace(path / name)
        if DELIVERED not in items:  # of a journal that is not the copy's
            (path / DELIVERED).unlink(missing_ok=True)
        for old in path.rglob(f"{CHECKPOINTS}/resume-*.ckpt"):
            if old.relative_to(path).as_posix() not in items:
                old.unlink()
        _write_downloaded(path, url, items)


def _write_downloaded(path: Path, url: str, items: Mapping[str, RemoteObject]) -> None:
    """Record that the run's files are those of its copy, so that none is uploaded again."""
    states = {name: ((path / name).stat(), item.version) for name, item in items.items()}
    files = {name: Uploaded(status.st_mtime_ns, status.st_size, version) for name, (status, version) in states.items()}
    write_uploaded(path, url, files)


def copy_of(resumed: str) -> str | None:
    """Return the folder of copies above the URL of a run, None for a local run."""
    return checked(resumed).rpartition("/")[0] if is_remote(resumed) else None


def with_copy_at(config: Config, path: Path, url: str | None) -> Config:
    """Return the config of a stored run with `trainer.copy_to`, and store it. url: None leaves the config as it is."""
    if url is None or config.trainer.copy_to == url:
        return config
    config = config.changed({"trainer.copy_to": url})
    write_config(config, path)
    return config


def fetch_unfinished(config: Config, name: str) -> Path | None:
    """Download the newest unfinished run with this config from `trainer.copy_to`, if it has one. name: as in `unfinished`.

    Raises as `fetch`.
    """
    if config.trainer.copy_to is None:
        return None
    folder = checked(config.trainer.copy_to)
    runs: dict[str, dict[str, RemoteObject]] = {}
    for item in client.listed(folder):
        run, _, place = item.url.removeprefix(f"{folder}/").partition("/")
        if run == config.trainer.run_name or (config.trainer.run_name is None and run.startswith(f"{name}-")):
            runs.setdefault(run, {})[place] = item
    with tempfile.TemporaryDirectory() as temporary:
        for run, items in runs.items():
            if RECORD in items and (config.trainer.run_name or not _is_finished(items)):
                _fetch_config(items, Path(temporary) / run)
        unfinished_run = unfinished(config.changed({"trainer.runs_dir": temporary}), name)
    return None if unfinished_run is None else fetch(f"{folder}/{unfinished_run.name}", Path(config.trainer.runs_dir))


def _is_finished(items: Mapping[str, RemoteObject]) -> bool:
    """Return whether a copy has a bundle and no checkpoint to resume from, without a request."""
    return f"{BUNDLE}/{MANIFEST}" in items and not any(name.startswith(f"{CHECKPOINTS}/resume-") for name in items)


def _fetch_config(items: Mapping[str, RemoteObject], target: Path) -> None:
    """Download what `unfinished` reads of a run. The time of the record is that of the run's start."""
    for name, item in items.items():
        if re.fullmatch(rf"{RECORD}|{CONFIG}|{FOLDER}/[^/]+\.py", name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                (target / name).write_bytes(client.read(item))
            except FileNotFoundError as error:
                raise client.changed(item.url) from error
    try:
        created = datetime.fromisoformat(json.loads((target / RECORD).read_text("utf-8"))["created"]).timestamp()
        os.utime(target / RECORD, (created, created))
    except (ValueError, KeyError, TypeError) as error:
        log.warning("skipped: the record of the copy %s cannot be read: %s", items[RECORD].url, error)


def _complete_items(items: Mapping[str, RemoteObject]) -> dict[str, RemoteObject]:
    """Return the objects without those of bundles whose upload was not complete."""
    whole = {name.removesuffix(MANIFEST) for name in items if name.endswith(f"{BUNDLE}/{MANIFEST}")}
    folders = ((name, re.match(rf"(.*/)?{BUNDLE}/", name)) for name in items)
    return {name: items[name] for name, folder in folders if folder is None or folder[0] in whole}


def _download(url: str, items: Mapping[str, RemoteObject], path: Path) -> None:
    size = sum(item.size for item in items.values())
    log.info("downloading %s to %s: %d files, %.1f MB", url, path, len(items), size / 1e6)
    try:
        download(url, list(items.values()), path)
    except FileNotFoundError as error:  # its training continues
        raise client.changed(url) from error
