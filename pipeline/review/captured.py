"""Read what a server captured: the images of `--sample`, their predictions, and the feedback of `--feedback-dir`."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from refract.pipeline.data.errors import DataError
from refract.pipeline.review.data import Captured

log = logging.getLogger(__name__)


class CapturedImage(NamedTuple):
    """file: of the image."""

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
        if not isinstance(row.get("image"), str) or not isinstance(row.get("confidence"), int | float):
            continue
        file = folder / row["image"]
        if not file.is_relative_to(folder) or ".." in Path(row["image"]).parts or not file.is_file():
            continue  # the server's quota removed it
        captured = Captured(float(row["confidence"]), tuple(row.get("answered", ())), truth.get(row["image"]))
        images.append(CapturedImage(file, captured))
    return images


def _judges(row: dict[str, Any]) -> bool:
    return isinstance(row.get("image"), str) and isinstance(row.get("labels"), list)


def _rows(folder: Path | None, pattern: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of all files. An incomplete last line, after a crash, is skipped."""
    for file in sorted(folder.glob(pattern)) if folder is not None else ():
        for line in file.read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                log.debug("%s: skipped an incomplete line", file)
                continue
            if isinstance(row, dict):
                yield row
