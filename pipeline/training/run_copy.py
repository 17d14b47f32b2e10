"""A copy of a run at a URL that is kept up to date during the training, so that another machine can resume it (`fetched_run.py`)."""

import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from refract.errors import RefractError
from refract.pipeline.config.config import ConfigError
from refract.pipeline.files import write_atomically
from refract.pipeline.tracking.journal import DELIVERED
from refract.pipeline.training.fit import CHECKPOINTS
from refract.pipeline.training.run_directory import RECORD, Run
from refract.remote import client
from refract.remote.client import RemoteError
from refract.remote.folders import MANIFEST
from refract.remote.store import RemoteObject

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Seconds between two looks for a new checkpoint."""
LAST_SECONDS = 60
"""Time for the last update of a training that was stopped or failed: a store that does not respond must not delay its end further."""
UPLOADED = ".copy.json"
"""The file of a run with the URL of its copy, and what that has."""
_RESUME = re.compile(rf"(.*/)?{CHECKPOINTS}/resume-(\d+)\.ckpt")


class Uploaded(NamedTuple):
    """The time of the last change (ns) and the size of a file when it was uploaded, and the version of the object."""

    changed: int
    size: int
    version: str


class RunCopy:
    """The copy of the run in `path` in the folder `url`, whose name is that of the run."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path.absolute(), f"{url.rstrip('/')}/{path.name}"
        self._uploaded: dict[str, Uploaded] | None = None
        self._old: set[str] = set()  # checkpoints of the copy
        self._updates = 0
        self._updating = threading.Lock()

    def update(self) -> None:
        """Upload new and changed files, and remove the checkpoints that the run has removed.

        A copy is valid at any moment: a checkpoint follows the files that it belongs to, and the records of a bundle and of a finished run
        follow the rest. RemoteError if the store refuses it. ConfigError if another machine has continued the copy.
        """
        with self._updating:
            self._uploaded = self._compared() if self._uploaded is None else self._unchanged(self._uploaded)
            try:
                with _frozen(self.path, self._uploaded) as (folder, names, changed):
                    started = {
                        name for name in changed if name.endswith(f"/{RECORD}") and not _is_finished(folder / name)
                    }
                    for name in sorted(changed, key=lambda name: (0, name) if name in started else order(name)):
                        item = client.upload(folder / name, f"{self.url}/{name}")
                        self._uploaded[name] = changed[name]._replace(version=item.version)
                    here = _progress(names, lambda name: (self.path / name).read_bytes())
                    for name in (self._old | set(filter(_RESUME.fullmatch, self._uploaded))) - names:
                        place, step = _place(name)
                        if step < here.get(place, -1):  # else the files of the run were lost
                            self._remove(name)
                            self._uploaded.pop(name, None)
                            self._old.discard(name)
                self._updates += 1
            finally:
                if self.path.is_dir():
                    write_uploaded(self.path, self.url, self._uploaded)

    def _remove(self, name: str) -> None:
        try:
            client.remove(f"{self.url}/{name}")
        except RemoteError as error:  # such as without the permission
            log.warning("trainer.copy_to: an old checkpoint stays: %s", error)

    def remove_unstarted(self) -> None:
        """Remove the first update of a run that could not start, so that its name becomes free again. RemoteError."""
        with self._updating:
            for name in list(self._uploaded or ()) if self._updates <= 1 else ():
                client.remove(f"{self.url}/{name}")

    def items(self) -> dict[str, RemoteObject]:
        """Return name → object of the copy. RemoteError."""
        return {item.url.removeprefix(f"{self.url}/"): item for item in client.listed(self.url)}

    def check_same(self, items: Mapping[str, RemoteObject]) -> None:
        """Raise ConfigError if there is something else than this run in the folder of its copy."""
        if not items or (RECORD not in items and read_uploaded(self.path, self.url)):
            return
        here = parsed_record(self.path / RECORD, (self.path / RECORD).read_bytes())
        there = parsed_record(self.url, client.read(items[RECORD])) if RECORD in items else {}
        if any(here.get(key) != there.get(key) for key in ("created", "fingerprint")):
            raise ConfigError(
                f"trainer.copy_to: {self.url} has something else than a copy of {self.path}; set another trainer.copy_to, or move that away"
            )

    def is_ahead(self, items: Mapping[str, RemoteObject]) -> bool:
        """Return whether the copy is finished, or has a newer checkpoint than the run. RemoteError."""
        from refract.pipeline.training.callbacks.checkpoints import newest  # imports Lightning

        names = [name for name in _names(self.path) if not _RESUME.fullmatch(name)]
        for folder in {self.path / CHECKPOINTS, *self.path.glob(f"*/{CHECKPOINTS}")}:
            if checkpoint := newest(folder):  # an intact one
                names.append(checkpoint.relative_to(self.path).as_posix())
        here = _progress(names, lambda name: (self.path / name).read_bytes())
        there = _progress(items, lambda name: client.read(items[name]))
        return any(step > here.get(folder, -1) for folder, step in there.items())

    def _compared(self) -> dict[str, Uploaded]:
        """Return what the copy has of the run, by its record of uploads."""
        items = self.items()
        self.check_same(items)
        if self.is_ahead(items):
            raise ConfigError(
                f"trainer.copy_to: another machine has continued {self.url}; move {self.path} away, then resume the copy with "
                f"`refract train --resume {self.url}`"
            )
        self._old = {name for name in items if _RESUME.fullmatch(name)}
        stored = read_uploaded(self.path, self.url)
        return {name: one for name, one in stored.items() if name in items and items[name].version == one.version}

    def _unchanged(self, uploaded: Mapping[str, Uploaded]) -> dict[str, Uploaded]:
        """Return what the copy still has. ConfigError if another machine has written it meanwhile."""
        items = self.items()
        for name, one in uploaded.items():
            if name in items and items[name].version != one.version:
                raise ConfigError(
                    f"trainer.copy_to: another machine writes {self.url}, as {name} has changed; stop one of the two trainings"
                )
        return {name: one for name, one in uploaded.items() if name in items}


@contextmanager
def copied(run: Run, url: str | None) -> Iterator[list[str]]:
    """Keep a copy of the run in the folder `url` during the block, and complete it at its end. None does nothing.

    An update that fails during the training is repeated with the next checkpoint. The yielded list gets the error of the last update.
    RemoteError if the first one fails. ConfigError if the copy is another run's, or if another machine has continued it.
    """
    failed: list[str] = []
    if url is None:
        yield failed
        return
    copy = RunCopy(run.path, url)
    log.info("copying the run to %s", copy.url)
    _begin(copy, run)
    follower = _Follower(copy)
    follower.start()
    try:
        yield failed
    except BaseException:
        log.info("completing the copy at %s, for at most %s s", copy.url, LAST_SECONDS)
        error = follower.end(LAST_SECONDS)
        if not run.resumed and not run.path.exists():  # it could not start
            with suppress(RefractError):
                copy.remove_unstarted()
        elif error:
            log.warning("trainer.copy_to: the copy of the run is not up to date: %s", error)
        raise
    if error := follower.end():
        failed.append(f"the run in {run.path} is complete, but its copy is not: {error}")
        log.warning("trainer.copy_to: %s", failed[0])


def _begin(copy: RunCopy, run: Run) -> None:
    try:
        if "?" in run.path.name:
            raise ConfigError(
                f"trainer.run_name: {run.path.name!r} has a question mark, which a URL cannot have; rename it"
            )
        items = {} if run.resumed else copy.items()
        if items:
            raise ConfigError(f"trainer.copy_to: {copy.url} exists already; set another trainer.run_name{_hint(copy)}")
        copy.update()
    except (RefractError, OSError) as error:
        if not run.resumed:
            with suppress(RefractError):
                copy.remove_unstarted()
            shutil.rmtree(run.path, ignore_errors=True)  # so that its name becomes free again
        if isinstance(error, RemoteError):
            raise RemoteError(f"trainer.copy_to: {error}") from error
        raise


def _hint(copy: RunCopy) -> str:
    """Return what to do with an existing copy: resume it, unless it is finished or no run."""
    record = copy.items().get(RECORD)
    if record is None or parsed_record(copy.url, client.read(record)).get("finished"):
        return ""
    return f", or resume it with `refract train --resume {copy.url}`"


class _Follower(threading.Thread):
    """Updates a copy when there is a new checkpoint, and at the end."""

    def __init__(self, copy: RunCopy) -> None:
        super().__init__(name="run copy", daemon=True)
        self._copy, self._ended = copy, threading.Event()
        self._error: Exception | None = RuntimeError("the last update did not run")

    def run(self) -> None:
        seen: set[str] = set()
        failed = False
        while not self._ended.wait(POLL_SECONDS):
            now = set(filter(_RESUME.fullmatch, _names(self._copy.path)))
            if now - seen:
                error = self._update()
                if error:
                    log.warning("trainer.copy_to: the copy of the run is not up to date: %s", error)
                elif failed:
                    log.info("trainer.copy_to: the copy of the run is up to date again")
                failed = error is not None
            seen = now
        self._error = self._update()

    def _update(self) -> Exception | None:
        try:
            self._copy.update()
        except Exception as error:  # the training continues, whatever the store's library raises
            return error
        return None

    def end(self, seconds: float | None = None) -> Exception | None:
        """Wait for the last update, for so many seconds or as long as it takes. Returns its error."""
        self._ended.set()
        self.join(seconds)
        return TimeoutError(f"{self._copy.url} was not reached in {seconds} s") if self.is_alive() else self._error


@contextmanager
def _frozen(path: Path, uploaded: dict[str, Uploaded]) -> Iterator[tuple[Path, set[str], dict[str, Uploaded]]]:
    """Yield (a folder with the state of the run's changed files at this moment, the names of all files, the changed ones)."""
    for rest in path.glob(".copy-*"):
        shutil.rmtree(rest, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".copy-") as temporary:
        folder, names, changed = Path(temporary), set[str](), dict[str, Uploaded]()
        for name in sorted(_names(path), key=order, reverse=True):  # so that a journal has what its mark counts
            file = path / name
            with suppress(FileNotFoundError):  # a newer checkpoint has replaced it
                status = file.stat()
                state = Uploaded(status.st_mtime_ns, status.st_size, "")
                if name not in uploaded or uploaded[name]._replace(version="") != state:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    _freeze(file, folder / name)
                    changed[name] = state
                names.add(name)
        yield folder, names, changed


def _names(path: Path) -> Iterator[str]:
    """Yield the names of a run's files but locks and unfinished ones. Folders that are renamed meanwhile are skipped."""
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(path).as_posix()


def _freeze(file: Path, target: Path) -> None:
    """Link large files, which are replaced as a whole. Copy others: lines are added to the journal."""
    if file.parent.name in (CHECKPOINTS, "bundle"):
        try:
            os.link(file, target)
            return
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            pass
    shutil.copyfile(file, target)


def order(name: str) -> tuple[int, str]:
    """Sort the files that make others valid after these."""
    folder, _, file = name.rpartition("/")
    if folder.endswith(CHECKPOINTS):
        return 2, name
    last = {DELIVERED: 1, MANIFEST: 3, RECORD: 4 if folder else 5}
    return last.get(file, 0), name


def _progress(names: Iterable[str], read: Callable[[str], bytes]) -> dict[str, float]:
    """Return folder of the run or of a fold → step of its newest checkpoint, infinite once it is finished. RemoteError."""
    found: dict[str, float] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if _RESUME.fullmatch(name):
            place, step = _place(name)
            found[place] = max(found.get(place, -1), step)
        elif file == RECORD and "/" not in folder and parsed_record(name, read(name)).get("finished"):
            found[folder] = float("inf")
    return found


def _place(checkpoint: str) -> tuple[str, int]:
    """Return (the folder of the run or of a fold, the step) of a checkpoint."""
    folder, step = checkpoint.rpartition(f"{CHECKPOINTS}/")[0], checkpoint.rpartition("-")[2].partition(".")[0]
    return folder.rstrip("/"), int(step)


def _is_finished(record: Path) -> bool:
    return bool(parsed_record(record, record.read_bytes()).get("finished"))


def parsed_record(name: Path | str, content: bytes) -> dict[str, Any]:
    """Parse the record of a run. RemoteError if it is damaged."""
    try:
        record = json.loads(content)
        return dict(record.items())
    except (ValueError, AttributeError) as error:
        raise RemoteError(
            f"{name}: the record of the run cannot be read ({error}); move the run or its copy away"
        ) from error


def complete(path: Path, url: str | None) -> None:
    """Bring the copy of a finished run up to date after a change of its files. An error is only logged. url: None does nothing."""
    if url is not None:
        try:
            RunCopy(path, url).update()
        except (RefractError, OSError) as error:
            log.warning("trainer.copy_to: the copy of the run is not up to date: %s", error)


def is_copied_to(path: Path, url: str) -> bool:
    """Return whether the copy of a run's folder is at this URL."""
    try:
        return json.loads((path / UPLOADED).read_text("utf-8"))["url"] == url
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_uploaded(path: Path, url: str) -> dict[str, Uploaded]:
    """Return what the run's file UPLOADED lists for this URL; nothing if it is missing or damaged."""
    try:
        stored = json.loads((path / UPLOADED).read_text("utf-8"))
        return {name: Uploaded(*one) for name, one in stored["files"].items()} if stored["url"] == url else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_uploaded(path: Path, url: str, files: dict[str, Uploaded]) -> None:
    """Write the run's file UPLOADED. OSError."""
    write_atomically(path / UPLOADED, json.dumps({"url": url, "files": files}).encode())


def uploaded_state(file: Path, item: RemoteObject) -> Uploaded:
    """Return the state of a file that has the content of an object."""
    status = file.stat()
    return Uploaded(status.st_mtime_ns, status.st_size, item.version)
