"""A copy of a run at a URL, so that another machine can resume it: kept up to date during the training, and fetched to continue."""

import hashlib
import json
import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.config.plugin_files import FOLDER
from refract.pipeline.training.fit import CHECKPOINTS
from refract.pipeline.training.run_directory import CONFIG, RECORD, Run, unfinished
from refract.remote import client
from refract.remote.client import RemoteError
from refract.remote.folders import MANIFEST, download
from refract.remote.store import RemoteObject

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Seconds between two looks for a new checkpoint."""

_BUNDLE = "bundle"


class RunCopy:
    """The copy of the run in `path` in the folder `url`. For one process at a time."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, f"{url.rstrip('/')}/{path.name}"
        self._stored: dict[str, tuple[int, int]] = {}
        self._known: dict[str, RemoteObject | None] | None = None
        self._updating = threading.Lock()

    def update(self) -> None:
        """Upload new and changed files, and remove those that the run no longer has. RemoteError.

        A copy is valid at any moment: a checkpoint follows the files that it belongs to, and the records of a bundle and of a finished run
        follow the rest.
        """
        with self._updating:
            if self._known is None:
                self._known = {item.url.removeprefix(f"{self.url}/"): item for item in client.listed(self.url)}
            names = sorted(self._names(), key=_order)
            for name in names:
                self._upload(name, self._known.get(name))
            for name in self._known.keys() - set(names):
                client.remove(f"{self.url}/{name}")
            self._known = dict.fromkeys(names)

    def _names(self) -> Iterator[str]:
        for path in self.path.rglob("*"):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and not any(
                part.startswith(".") for part in name.split("/")
            ):  # locks and unfinished files
                yield name

    def _upload(self, name: str, present: RemoteObject | None) -> None:
        path = self.path / name
        try:
            status = path.stat()
            version = status.st_mtime_ns, status.st_size
            if self._stored.get(name) == version:
                return
            if present is not None and _equal(path, present):
                pass
            elif name.startswith(f"{CHECKPOINTS}/"):  # large, and replaced atomically
                client.upload(path, f"{self.url}/{name}")
            else:
                with tempfile.TemporaryDirectory() as folder:  # a journal may grow meanwhile
                    client.upload(Path(shutil.copyfile(path, Path(folder) / path.name)), f"{self.url}/{name}")
        except FileNotFoundError:  # a newer checkpoint has replaced it
            return
        self._stored[name] = version


@contextmanager
def copied(run: Run, url: str | None) -> Iterator[None]:
    """Keep a copy of the run in the folder `url` during the block, and complete it at its end. None does nothing.

    An update that fails during the training is repeated with the next checkpoint. RemoteError if the first one or, after a finished
    training, the last one fails. ConfigError if another run has the name.
    """
    if url is None:
        yield
        return
    copy = RunCopy(run.path, url)
    _begin(copy, run)
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(copy, ended), name="run copy", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        _end(thread, ended)
        _try_update(copy)
        raise
    _end(thread, ended)
    try:
        copy.update()
    except RemoteError as error:
        raise RemoteError(
            f"the run in {run.path} is complete, but its copy is not: {error}; then complete it with `refract sync {run.path}`"
        ) from error


def _begin(copy: RunCopy, run: Run) -> None:
    try:
        items = client.listed(copy.url)
        if items and not run.resumed:
            raise ConfigError(
                f"trainer.copy_to: {copy.url} exists already; set another trainer.run_name, or resume it with "
                f"`refract train --resume {copy.url}`"
            )
        if _is_ahead(copy, items):
            raise ConfigError(
                f"trainer.copy_to: another machine has continued {copy.url}; move {run.path} away, then resume the copy with "
                f"`refract train --resume {copy.url}`"
            )
        copy.update()
    except (ConfigError, RemoteError):
        if not run.resumed:
            shutil.rmtree(run.path)  # so that its name becomes free again
        raise


def _is_ahead(copy: RunCopy, items: Sequence[RemoteObject]) -> bool:
    """Return whether the copy is finished, or has a newer checkpoint than the run."""
    for item in items:
        if item.url == f"{copy.url}/{RECORD}" and json.loads(client.read(item)).get("finished"):
            return True
    here = [path.as_posix() for path in (copy.path / CHECKPOINTS).glob("*.ckpt")]
    return _newest_step(item.url for item in items) > _newest_step(here)


def _newest_step(paths: Iterable[str]) -> int:
    found = (re.search(rf"/{CHECKPOINTS}/resume-(\d+)\.ckpt$", path) for path in paths)
    return max((int(match[1]) for match in found if match), default=-1)


def _follow(copy: RunCopy, ended: threading.Event) -> None:
    """Update the copy when there is a new checkpoint."""
    seen = set[str]()
    while not ended.wait(POLL_SECONDS):
        now = {path.name for path in (copy.path / CHECKPOINTS).glob("*.ckpt")}
        if now - seen and _try_update(copy):
            seen = now


def _end(thread: threading.Thread, ended: threading.Event) -> None:
    ended.set()
    thread.join()


def _try_update(copy: RunCopy) -> bool:
    try:
        copy.update()
        return True
    except (RemoteError, OSError) as error:
        log.warning("trainer.copy_to: the copy of the run is not up to date: %s", error)
        return False


def _equal(path: Path, item: RemoteObject) -> bool:
    """Return whether the file has the content of the object, as far as its size and its MD5 show."""
    kind, _, digest = item.checksum.partition(":")
    if kind != "md5" or path.stat().st_size != item.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == digest


def _order(name: str) -> tuple[int, str]:
    """Sort the files that make others valid after these."""
    if name.startswith(f"{CHECKPOINTS}/"):
        return 1, name
    return {f"{_BUNDLE}/{MANIFEST}": 2, RECORD: 3}.get(name, 0), name


def fetch(url: str, runs_dir: Path) -> Path:
    """Download the copy of a run to its folder in `runs_dir`, to resume it there.

    RemoteError if there is none. ConfigError if the folder exists.
    """
    url = url.rstrip("/")
    path = runs_dir / url.rpartition("/")[2]
    if path.exists():
        raise ConfigError(
            f"--resume: {url}: {path} exists; resume it with `refract train --resume {path}`, or move it away"
        )
    items = client.listed(url)
    names = {item.url.removeprefix(f"{url}/") for item in items}
    if RECORD not in names:
        raise ConfigError(f"--resume: {url} is not a run: it has no {RECORD}")
    if f"{_BUNDLE}/{MANIFEST}" not in names:  # an unfinished bundle
        items = [item for item in items if not item.url.startswith(f"{url}/{_BUNDLE}/")]
    runs_dir.mkdir(parents=True, exist_ok=True)
    download(url, items, path)
    return path


def fetch_unfinished(config: Config, name: str) -> Path | None:
    """Download the newest unfinished run with this config from `trainer.copy_to`, if it has one. Raises as `fetch`."""
    folder = (config.trainer.copy_to or "").rstrip("/")
    if not folder:
        return None
    with tempfile.TemporaryDirectory() as temporary:
        for item in client.listed(folder):
            place = item.url.removeprefix(f"{folder}/")
            if re.fullmatch(rf"[^/]+/({RECORD}|{CONFIG}|{FOLDER}/[^/]+\.py)", place):
                path = Path(temporary) / place
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(client.read(item))
        found = unfinished(config.changed({"trainer.runs_dir": temporary}), name)
    return None if found is None else fetch(f"{folder}/{found.name}", Path(config.trainer.runs_dir))
