"""Pictures that the tests make: three colours, told apart in an epoch."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from pipeline.config import Config

COLORS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 40, 50)}


def picture(label: str, number: int, side: int = 24) -> np.ndarray:
    """A noisy patch of the label's colour; every number is another picture."""
    noise = np.random.default_rng([number, *label.encode()]).normal(0, 25, (side, side + number % 5, 3))
    return np.clip(np.array(COLORS[label]) + noise, 0, 255).astype(np.uint8)


def write_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels[:, :, ::-1])


def config_of(source: Path | str, **data) -> Config:
    config = Config()
    config.data.source = str(source)
    for key, value in data.items():
        setattr(config.data, key, value)
    return config


Run = Callable[..., subprocess.CompletedProcess[str]]
