"""The files of a run and those of its copy at a URL: which have changed, which make others valid, and how far the training is."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from refract.pipeline.files import write_atomically
from refract.pipeline.tracking.journal import DELIVERED
from refract.pipeline.training.fit import CHECKPOINTS
from refract.pipeline.training.run_directory import RECORD
from refract.remote.client import RemoteError
from refract.remote.folders import MANIFEST

BUNDLE = "bundle"
UPLOADED = ".copy.json"
"""The file of a run with the URL of its copy, and what that has."""
RESUME = re.compile(rf"(?:(.*)/)?{CHECKPOINTS}/resume-(\d+)\.ckpt")
"""The name of a checkpoint: the folder of a fold, and the step."""


class Uploaded(NamedTuple):
    """The time of the last change (ns) and the size of a file when it was uploaded, and the version of the object."""

    changed: int
    size: int
    version: str


class Frozen(NamedTuple):
    """The state of a run at one moment. folder: the changed files; names: those of all files; changed: name → state."""

    folder: Path
    names: set[str]
    changed: dict[str, Uploaded]


def names_of(path: Path) -> Iterator[str]:
    """Yield the names of a run's files but locks and unfinished ones. Folders that are renamed meanwhile are skipped."""
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(path).as_posix()


@contextmanager
def frozen(path: Path, uploaded: Mapping[str, Uploaded]) -> Iterator[Frozen]:
    """Yield the state of a run at this moment, in a temporary folder of the run. uploaded: the files that have not changed since.

    FileNotFoundError if the run's folder is gone.
    """
    for rest in path.glob(".copy-*"):  # of a process that was killed
        shutil.rmtree(rest, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".copy-") as temporary:
        state = Frozen(Path(temporary), set(), {})
        # A file that makes others valid comes first, so that these are there: a journal has what its mark counts.
        for name in sorted(names_of(path), key=order, reverse=True):
            with suppress(FileNotFoundError):  # a newer checkpoint has replaced it
                status = (path / name).stat()
                now = Uploaded(status.st_mtime_ns, status.st_size, "")
                if name not in uploaded or uploaded[name]._replace(version="") != now:
                    (state.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    _freeze(path / name, state.folder / name)
                    state.changed[name] = now
                state.names.add(name)
        yield state


def _freeze(file: Path, target: Path) -> None:
    """Link large files, which are replaced as a whole. Copy others: lines are added to the journal."""
    if file.parent.name in (CHECKPOINTS, BUNDLE):
        try:
            os.link(file, target)
            return
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            pass
    shutil.copyfile(file, target)


def order(name: str) -> tuple[int, str]:
    """Sort a run's files so that one that makes others valid comes after them."""
    folder, _, file = name.rpartition("/")
    if folder.endswith(CHECKPOINTS):
        return 2, name
    last = {DELIVERED: 1, MANIFEST: 3, RECORD: 4 if folder else 5}
    return last.get(file, 0), name


def in_order_of_upload(state: Frozen) -> list[str]:
    """Return the names of the changed files in the order in which a copy needs them."""

    def key(name: str) -> tuple[int, str]:
        # The record of a fold that trains is needed before its checkpoints, and of a finished one after its bundle.
        starts = name.endswith(f"/{RECORD}") and not parsed_record(name, (state.folder / name).read_bytes()).get(
            "finished"
        )
        return (0, name) if starts else order(name)

    return sorted(state.changed, key=key)


def progress(names: Iterable[str], read: Callable[[str], bytes]) -> dict[str, float]:
    """Return folder of the run ("") or of a fold → step of its newest checkpoint, infinite once it is finished. RemoteError."""
    steps: dict[str, float] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if match := RESUME.fullmatch(name):
            steps[match[1] or ""] = max(steps.get(match[1] or "", -1), int(match[2]))
        elif file == RECORD and "/" not in folder and parsed_record(name, read(name)).get("finished"):
            steps[folder] = float("inf")
    return steps


def is_behind(checkpoint: str, steps: Mapping[str, float]) -> bool:
    """Return whether a run or fold of these `progress` no longer needs the checkpoint."""
    match = RESUME.fullmatch(checkpoint)
    return match is not None and int(match[2]) < steps.get(match[1] or "", -1)


def parsed_record(name: Path | str, content: bytes) -> dict[str, Any]:
    """Parse the record of a run. RemoteError if it is damaged."""
    try:
        return dict(json.loads(content).items())
    except (ValueError, AttributeError) as error:
        raise RemoteError(
            f"{name}: the record of the run cannot be read ({error}); move the run or its copy away"
        ) from error


def read_uploaded(path: Path, url: str) -> dict[str, Uploaded]:
    """Return what the run's file UPLOADED lists for this URL; nothing if it is missing or damaged."""
    try:
        stored = json.loads((path / UPLOADED).read_text("utf-8"))
        return {name: Uploaded(*one) for name, one in stored["files"].items()} if stored["url"] == url else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_uploaded(path: Path, url: str, files: Mapping[str, Uploaded]) -> None:
    """Write the run's file UPLOADED. OSError."""
    write_atomically(path / UPLOADED, json.dumps({"url": url, "files": dict(files)}).encode())
