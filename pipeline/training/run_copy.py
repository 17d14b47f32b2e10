"""A copy of a run at a URL that is kept up to date during the training, so that another machine can resume it (`fetched_run.py`)."""

import logging
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from refract.errors import RefractError
from refract.pipeline.config.config import ConfigError
from refract.pipeline.training.fit import CHECKPOINTS
from refract.pipeline.training.run_directory import RECORD, Run
from refract.pipeline.training.run_files import (
    RESUME,
    Uploaded,
    frozen,
    in_order_of_upload,
    is_behind,
    names_of,
    parsed_record,
    progress,
    read_uploaded,
    write_uploaded,
)
from refract.remote import client
from refract.remote.client import RemoteError
from refract.remote.store import RemoteObject

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Seconds between two checks for a new checkpoint."""
LAST_SECONDS = 60
"""Time for the last update of a training that was stopped or failed: a store that does not respond must not delay its end further."""


class RunCopy:
    """The copy of the run in `path` in the folder `url`, whose name is that of the run. For one thread."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path.absolute(), f"{url.rstrip('/')}/{path.name}"
        self._uploaded: dict[str, Uploaded] | None = None
        self._old: set[str] = set()  # checkpoints that the copy had at the start
        self._updates = 0

    def update(self) -> None:
        """Upload new and changed files, and remove the checkpoints that the run no longer needs.

        A copy is valid at any moment: a checkpoint is uploaded after the other files, then the record of a bundle, and at last that of a
        finished run. RemoteError if the store refuses it. ConfigError if another machine has continued the copy, or if it is another run's.
        FileNotFoundError if the run's folder is gone.
        """
        self._uploaded = self._compared() if self._uploaded is None else self._unchanged(self._uploaded)
        try:
            with frozen(self.path, self._uploaded) as state:
                for name in in_order_of_upload(state):
                    item = client.upload(state.folder / name, f"{self.url}/{name}")
                    self._uploaded[name] = state.changed[name]._replace(version=item.version)
                steps = progress(state.names, self._read)
                for name in (self._old | self._uploaded.keys()) - state.names:
                    if is_behind(name, steps):  # another file is lost here, and stays in the copy
                        self._remove(name)
            self._updates += 1
        finally:
            if self.path.is_dir():
                write_uploaded(self.path, self.url, self._uploaded)

    def _remove(self, checkpoint: str) -> None:
        self._old.discard(checkpoint)
        if self._uploaded is not None:
            self._uploaded.pop(checkpoint, None)
        try:
            client.remove(f"{self.url}/{checkpoint}")
        except RemoteError as error:  # such as without the permission
            log.warning("trainer.copy_to: an old checkpoint stays: %s", error)

    def remove_unstarted(self) -> None:
        """Remove the first update of a run that could not start, so that its name becomes free again. RemoteError."""
        for name in list(self._uploaded or ()) if self._updates <= 1 else ():
            client.remove(f"{self.url}/{name}")

    def items(self) -> dict[str, RemoteObject]:
        """Return name → object of the copy. RemoteError."""
        return {item.url.removeprefix(f"{self.url}/"): item for item in client.listed(self.url)}

    def check_same(self, items: Mapping[str, RemoteObject]) -> None:
        """Raise ConfigError if the folder of the copy has something else than this run, or if there is only that. RemoteError."""
        if not items or (RECORD not in items and read_uploaded(self.path, self.url)):
            return
        try:
            here = parsed_record(self.path / RECORD, self._read(RECORD))
        except OSError as error:
            raise ConfigError(
                f"{self.path} is not a run, and {self.url} not its copy; move {self.path} away"
            ) from error
        there = parsed_record(self.url, client.read(items[RECORD])) if RECORD in items else {}
        if any(here.get(key) != there.get(key) for key in ("created", "fingerprint")):
            raise ConfigError(
                f"trainer.copy_to: {self.url} is not a copy of {self.path}; set another trainer.copy_to, or move one of them away"
            )

    def is_ahead(self, items: Mapping[str, RemoteObject]) -> bool:
        """Return whether the copy is finished, or has a newer checkpoint than the run. RemoteError."""
        from refract.pipeline.training.callbacks.checkpoints import newest  # imports Lightning

        names = [name for name in names_of(self.path) if not RESUME.fullmatch(name)]
        for folder in {self.path / CHECKPOINTS, *self.path.glob(f"*/{CHECKPOINTS}")}:
            if checkpoint := newest(folder):  # an intact one
                names.append(checkpoint.relative_to(self.path).as_posix())
        here, there = progress(names, self._read), progress(items, lambda name: client.read(items[name]))
        return any(step > here.get(folder, -1) for folder, step in there.items())

    def _read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def _compared(self) -> dict[str, Uploaded]:
        """Return what the copy has of the run, by its record of uploads."""
        items = self.items()
        self.check_same(items)
        if self.is_ahead(items):
            raise ConfigError(
                f"trainer.copy_to: another machine has continued {self.url}; move {self.path} away, then resume the copy with "
                f"`refract train --resume {self.url}`"
            )
        self._old = set(filter(RESUME.fullmatch, items))
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


@dataclass
class Copied:
    """error: why the copy of a finished run is not complete; None if it is, or if there is none."""

    error: str | None = None


@contextmanager
def copied(run: Run, url: str | None) -> Iterator[Copied]:
    """Keep a copy of the run in the folder `url` during the block, and complete it at its end. None does nothing.

    An update that fails during the training is repeated with the next checkpoint. RemoteError if the first one fails. ConfigError if the
    copy is another run's, or if another machine has continued it.
    """
    result = Copied()
    if url is None:
        yield result
        return
    copy = RunCopy(run.path, url)
    log.info("copying the run to %s", copy.url)
    _begin(copy, run)
    follower = _Follower(copy)
    follower.start()
    try:
        yield result
    except BaseException:
        log.info("completing the copy at %s, for at most %s s", copy.url, LAST_SECONDS)
        error = follower.end(LAST_SECONDS)
        if not (run.resumed or run.path.exists() or follower.is_alive()):  # it could not start
            with suppress(RefractError):
                copy.remove_unstarted()
        elif error:
            _warn(error)
        raise
    if error := follower.end():
        result.error = f"the run in {run.path} is complete, but its copy is not: {error}"
        log.warning("trainer.copy_to: %s", result.error)


def _begin(copy: RunCopy, run: Run) -> None:
    try:
        if "?" in run.path.name:
            raise ConfigError(
                f"trainer.run_name: {run.path.name!r} has a question mark, which a URL cannot have; rename it"
            )
        if not run.resumed:
            _check_free(copy)
        copy.update()
    except (RefractError, OSError) as error:
        if not run.resumed:
            with suppress(RefractError):
                copy.remove_unstarted()
            shutil.rmtree(run.path, ignore_errors=True)  # so that its name becomes free again
        if isinstance(error, RemoteError):
            raise RemoteError(f"trainer.copy_to: {error}") from error
        raise


def _check_free(copy: RunCopy) -> None:
    """Raise ConfigError if the folder of a new run's copy exists."""
    items = copy.items()
    if items:
        unfinished = RECORD in items and not parsed_record(copy.url, client.read(items[RECORD])).get("finished")
        hint = f", or resume it with `refract train --resume {copy.url}`" if unfinished else ""
        raise ConfigError(f"trainer.copy_to: {copy.url} exists already; set another trainer.run_name{hint}")


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
            now = set(filter(RESUME.fullmatch, names_of(self._copy.path)))
            if now - seen:
                error = self._update()
                if error:
                    _warn(error)
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


def complete(path: Path, url: str | None) -> None:
    """Bring the copy of a finished run up to date after a change of its files. An error is only logged. url: None does nothing."""
    if url is not None:
        try:
            RunCopy(path, url).update()
        except (RefractError, OSError) as error:
            _warn(error)


def _warn(error: Exception) -> None:
    log.warning("trainer.copy_to: the copy of the run is not up to date: %s", error)
