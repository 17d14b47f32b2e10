"""Small data sets that the tests make, and the command as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

COLORS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 40, 50)}


def picture(label: str, number: int, side: int = 24) -> np.ndarray:
    """A noisy patch of the label's colour; every number is another picture."""
    noise = np.random.default_rng([number, *label.encode()]).normal(0, 25, (side, side + number % 5, 3))
    return np.clip(np.array(COLORS[label]) + noise, 0, 255).astype(np.uint8)


def write_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels[:, :, ::-1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """CLASS/NN.jpg: three classes of 20 pictures."""
    root = tmp_path / "pictures"
    for label in COLORS:
        for number in range(20):
            write_picture(root / label / f"{number:02}.jpg", picture(label, number))
    return root


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def refract(tmp_path: Path) -> Run:
    """Run `refract …` in tmp_path, with no tracking server but the default."""
    environment = {**os.environ, "HOME": str(tmp_path / "home")}
    environment.pop("MLFLOW_TRACKING_URI", None)

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "refract", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
        assert done.returncode == code, f"exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run
