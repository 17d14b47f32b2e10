"""Small data sets of the tests, such as images in three colours that a network learns in an epoch; and helpers for processes."""

import csv
import io
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import cv2
import numpy as np
import pytest
from warm_process import Started

from refract.pipeline.config.config import Config
from refract.pipeline.config.sections import DataConfig
from refract.pipeline.retraining.workspace import read, write

COLORS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 40, 50)}


def make_image(label: str, number: int, side: int = 24) -> np.ndarray:
    """Return a noisy patch of the label's colour; each number gives a different image."""
    noise = np.random.default_rng([number, *label.encode()]).normal(0, 25, (side, side + number % 5, 3))
    return np.clip(np.array(COLORS[label]) + noise, 0, 255).astype(np.uint8)


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels[:, :, ::-1])


def table(file: Path, rows: list[list[str]], columns: list[str]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as target:
        csv.writer(target).writerows([columns, *rows])
    return file


def rewritten(manifest: Path, name: str, change: Callable[[int, str], str]) -> Path:
    """Write a copy of the manifest with changed texts. change: (row number, text) → new text."""
    with manifest.open(newline="") as file:
        columns, *rows = csv.reader(file)
    column = columns.index("text")
    for number, row in enumerate(rows):
        row[column] = change(number, row[column])
    return table(manifest.with_name(name), rows, columns)


def config_of(source: Path | str, **data) -> Config:
    return Config(data=DataConfig(source=str(source), **data))


def descendants(pid: int) -> list[int]:
    """Return the ids of all child processes, recursively."""
    pids = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            pids += [child, *descendants(child)]
    return pids


def until_gone(pids: Iterable[int]) -> None:
    """Wait until the processes have ended by themselves, at most 20 s."""
    end = time.monotonic() + 20
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, f"{alive} have outlived their parent"
        time.sleep(0.01)


def until(process: Started, prefix: str) -> str:
    """Return the output up to the first line that starts with `prefix`."""
    output = ""
    for line in process.output:
        output += line
        if line.startswith(prefix):
            return output
    raise AssertionError(output)


Run = Callable[..., subprocess.CompletedProcess[str]]
Training = Callable[..., AbstractContextManager[Started]]


def paint(root: Path, numbers: range, labels: Iterable[str] = tuple(COLORS)) -> None:
    """Write LABEL/NNN.png for each label and number."""
    for label in labels:
        for number in numbers:
            write_image(root / label / f"{number:03}.png", make_image(label, number, side=16))


def to_former_layout(workspace: Path) -> None:
    """Rename a workspace's files and keys to those of an earlier version."""
    former = {"run": "night", "training_run": "run"}
    records = [path for path in (workspace / "last.json", *workspace.glob("runs/*/run.json")) if path.exists()]
    for path in records:
        path.write_text(path.read_text().replace('"summary":', '"told":'))
        record = {former.get(key, key): value for key, value in read(path).items()}
        if "skipped" in (snapshot := record.get("snapshot") or {}):
            snapshot["left_out"] = snapshot.pop("skipped")
        write(path, record)
    for path in workspace.glob("runs/*/run.json"):
        path.rename(path.with_name("night.json"))
    (workspace / "runs").rename(workspace / "nights")


def tar_of(path: str, *members: tuple[str, bytes] | tarfile.TarInfo) -> str:
    """Write a tar of members in this order: (name, content), or a header without content. Return its path."""
    with tarfile.open(path, "w") as target:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                target.addfile(member)
            else:
                entry = tarfile.TarInfo(member[0])
                entry.size = len(member[1])
                target.addfile(entry, io.BytesIO(member[1]))
    return path


def interrupt_before_first_step(config: Config) -> None:
    """Start a training, and interrupt it as Ctrl-C does when its run's folder is complete."""
    from refract.pipeline.training import run

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "fit", interrupted)
        run.train(config)
