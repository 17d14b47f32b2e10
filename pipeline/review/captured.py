"""Read what a server captured: the images of `--sample`, their predictions, and the feedback of `--feedback-dir`."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from refract.pipeline.data.errors import DataError
from refract.pipeline.review.data import Captured

log = logging.getLogger(__name__)


class CapturedImage(NamedTuple):
    """file: the image file."""

    file: Path
    captured: Captured


def captured_images(folder: Path, feedback: Path | None = None) -> list[CapturedImage]:
    """Return the images in a server's capture folder that still exist, oldest first.

    feedback: folder with `feedback-*.jsonl`; the last feedback on an image counts. DataError for a folder that no server wrote.
    """
    if not folder.is_dir() or not any(folder.glob("inputs-*.jsonl")):
        raise DataError(
            f"{folder}: has no inputs-*.jsonl; name the folder of `refract serve --sample FOLDER`, "
            "and start it with --sample-below to store images"
        )
    truth = {row["image"]: tuple(row["labels"]) for row in _rows(feedback, "feedback-*.jsonl") if _judges(row)}
    images = []
    for row in _rows(folder, "inputs-*.jsonl"):
        if not isinstance(row.get("image"), str) or not _is_fraction(row.get("confidence")):
            continue
        answered = row.get("answered", [])
        if not _are_texts(answered) or (file := _file(folder, row["image"])) is None:
            continue
        captured = Captured(float(row["confidence"]), tuple(answered), truth.get(row["image"]))
        images.append(CapturedImage(file, captured))
    return images


def _file(folder: Path, name: str) -> Path | None:
    """Return a captured image, None if the server's quota removed it, or if it is not a file below the folder."""
    try:
        file = folder / name
        return file if file.is_file() and file.resolve().is_relative_to(folder.resolve()) else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= 1


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _judges(row: dict[str, Any]) -> bool:
    return isinstance(row.get("image"), str) and _are_texts(row.get("labels"))


def _rows(folder: Path | None, pattern: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of all files. A line that is not JSON, such as the last one after a crash, is skipped."""
    for file in sorted(folder.glob(pattern)) if folder is not None else ():
        for line in file.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                log.debug("%s: skipped a line that is not JSON", file)
                continue
            if isinstance(row, dict):
                yield row
