"""Write the most confident errors of a report as image files, whose names are their captions, for a tracking server's pages."""

import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from refract.augment import ImageError
from refract.pipeline.data.manifest import Sample
from refract.pipeline.evaluation.report import Report
from refract.pipeline.evaluation.report.figures import small_jpeg

log = logging.getLogger(__name__)

FOLDER = "errors"
SIDE = 256
"""The longer side of an image in pixels."""

LONGEST_NAME = 100
"""Bytes of the longest file name, without its suffix."""


def write_error_images(report: Report, samples: Sequence[Sample], run_dir: Path) -> Path | None:
    """Write the images of the report's gallery of errors to the folder `errors`, the most confident first, and return it.

    samples: those of the evaluation. Samples without an image are skipped; None if no image remains. The folder appears when it is
    complete. OSError if that fails.
    """
    by_path = {sample.path: sample for sample in samples if sample.has_image}
    rows = [row for row in report.galleries.get("Most confident errors", ()) if row["path"] in by_path]
    target = run_dir / FOLDER
    if not rows or target.exists():
        return target if target.exists() else None
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}.", dir=run_dir) as temporary:
        folder = Path(temporary) / FOLDER
        folder.mkdir()
        for number, row in enumerate(rows, start=1):
            try:
                (folder / f"{_name(number, row['caption'])}.jpg").write_bytes(
                    small_jpeg(by_path[row["path"]].read(), SIDE)
                )
            except ImageError as error:
                log.warning("%s: not in the gallery of errors: %s", row["path"], error)
        if not any(folder.iterdir()):
            return None
        folder.rename(target)
    return target


def _name(number: int, caption: str) -> str:
    """Return `01 dog 97 percent, labelled cat`: characters that every file system and address accepts."""
    caption = caption.partition(": “")[0].replace("%", " percent")
    readable = " ".join(re.sub(r"[^\w,.()+-]+", " ", caption).split())
    return f"{number:02} {readable}".encode()[:LONGEST_NAME].decode("utf-8", "ignore").strip(" .")
