"""Data that the tests make, as images of three colours, told apart in an epoch; and processes that they look after."""

import csv
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import cv2
import numpy as np
from warm_process import Started

from refract.pipeline.config.config import Config

COLORS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 40, 50)}


def make_image(label: str, number: int, side: int = 24) -> np.ndarray:
    """A noisy patch of the label's colour; every number is another image."""
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
    """The manifest with other texts, from a row's number and text."""
    with manifest.open(newline="") as file:
        columns, *rows = csv.reader(file)
    place = columns.index("text")
    for number, row in enumerate(rows):
        row[place] = change(number, row[place])
    return table(manifest.with_name(name), rows, columns)


def config_of(source: Path | str, **data) -> Config:
    config = Config()
    config.data.source = str(source)
    for key, value in data.items():
        setattr(config.data, key, value)
    return config


def descendants(pid: int) -> list[int]:
    """The processes that one began, and those that they began."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def until_gone(pids: Iterable[int]) -> None:
    """What a process that was killed had begun ends by itself."""
    end = time.monotonic() + 20
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, f"{left} have outlived what began them"
        time.sleep(0.01)


def until(process: Started, beginning: str) -> str:
    """What it prints up to the first line that begins so."""
    told = ""
    for line in process.output:
        told += line
        if line.startswith(beginning):
            return told
    raise AssertionError(told)


Run = Callable[..., subprocess.CompletedProcess[str]]
Training = Callable[..., AbstractContextManager[Started]]
