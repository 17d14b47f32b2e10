"""Converted networks on the disk, each whole or not there."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from refract.serve.runtime.backends.base import first_line

logger = logging.getLogger(__name__)

PART, ABANDONED_S = "part-", 3600
"""Prefix of folders in which files are written, and the age from which such a folder counts as left by a killed process."""


def store(folder: Path, suffix: str, write: Callable[[Path], object]) -> None:
    """Let `write` write a file, and rename it to `kept.SUFFIX` when it is whole.

    Where that fails, as in a read-only container, it is logged, and the next start converts again.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A folder for this call alone: other containers may write here with the same process number.
        with tempfile.TemporaryDirectory(prefix=PART, dir=folder) as part:
            write(Path(part, f"kept.{suffix}"))
            for written in sorted(Path(part).iterdir()):  # of OpenVINO's two files that first, which the other needs
                _rename(written, folder / written.name)
    except (OSError, RuntimeError) as err:  # OpenVINO raises the second
        logger.warning("%s is not kept: %s", folder, first_line(err))
    for abandoned in folder.glob(f"{PART}*"):
        with suppress(OSError):
            if time.time() - abandoned.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(abandoned)


def _rename(part: Path, kept: Path) -> None:
    """Rename after the bytes are on the disk: else a loss of power leaves the name with fewer bytes."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(kept)
