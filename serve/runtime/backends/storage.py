"""Store converted networks on the disk atomically."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from refract.errors import first_line

logger = logging.getLogger(__name__)

PART, ABANDONED_S = "part-", 3600
"""Prefix of temporary folders, and the age in seconds from which such a folder is a killed process's and is removed."""


def store(folder: Path, suffix: str, write: Callable[[Path], object]) -> None:
    """Store the file that `write` writes as `kept.SUFFIX`, under that name only when it is complete.

    If that fails, as in a read-only container, a warning is logged and the next start converts the network again.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A folder for this call only: other containers may write here with the same process id.
        with tempfile.TemporaryDirectory(prefix=PART, dir=folder) as part:
            write(Path(part, f"kept.{suffix}"))
            for written in sorted(
                Path(part).iterdir()
            ):  # OpenVINO writes two files; kept.bin, which kept.xml needs, is renamed first
                _rename(written, folder / written.name)
    except (OSError, RuntimeError) as err:  # OpenVINO raises RuntimeError
        logger.warning("%s: the converted network is not stored: %s", folder, first_line(err))
    for abandoned in folder.glob(f"{PART}*"):
        with suppress(OSError):
            if time.time() - abandoned.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(abandoned)


def _rename(part: Path, target: Path) -> None:
    """Rename `part` after a sync to the disk. Otherwise a power failure could leave a truncated file under the final name."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
