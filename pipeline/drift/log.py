"""Read the inputs that a server sampled (`refract serve --sample DIR`) as a profile. The server is independent of this package.

`inputs-*.jsonl` has a row for each sampled image: time, model (16 digits of the bundle's digest), answered (predicted labels), confidence,
statistics (name → number), and image (a file below the folder, stored for low confidence) or null.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from refract.models.bundle.info import BundleInfo
from refract.pipeline.data.manifest import DataError, Sample
from refract.pipeline.drift.profile import STATISTICS, Profile

ROWS = "inputs-*.jsonl"


def is_log(folder: Path) -> bool:
    """Whether the folder has a server's sampled inputs."""
    return folder.is_dir() and any(folder.glob(ROWS))


def read_log(folder: Path, info: BundleInfo, digest: str) -> tuple[Profile, list[Sample], int]:
    """Return (the profile of this bundle's rows, their stored images, the number of rows of other models).

    Incomplete lines, as after a crash, are skipped. The profile has no features, as images of low confidence are a biased sample.
    DataError if no row is of this bundle.
    """
    rows = [row for file in sorted(folder.glob(ROWS)) for row in _rows(file)]
    bundle_rows = [row for row in rows if row["model"] == digest[:16]]
    if not bundle_rows:
        models = Counter(row["model"] for row in rows)
        others = ", ".join(f"{name} ({count})" for name, count in models.most_common(5)) or "nothing"
        raise DataError(f"{folder}: has no inputs of this bundle ({digest[:16]}), only of {others}")
    index = {label: i for i, label in enumerate(info.labels)}
    answered = np.zeros(len(index), np.int64)
    for row in bundle_rows:
        for label in row["answered"]:
            if label in index:
                answered[index[label]] += 1
    statistics = {
        name: np.array([row["statistics"].get(name, np.nan) for row in bundle_rows], np.float32)
        for name in STATISTICS if any(name in row["statistics"] for row in bundle_rows)
    }  # fmt: skip
    confidence = np.array([row["confidence"] for row in bundle_rows], np.float32)
    files = [folder / row["image"] for row in bundle_rows if row["image"]]
    root = folder.resolve()
    samples = [Sample(str(file), ()) for file in files if file.is_file() and file.resolve().is_relative_to(root)]
    profile = Profile(
        len(bundle_rows), info.labels, None, answered, confidence, statistics, None, info.task == "multilabel"
    )  # fmt: skip
    return profile, samples, len(rows) - len(bundle_rows)


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            confidence, answered, statistics = float(row["confidence"]), list(row["answered"]), dict(row["statistics"])
            numbers = {str(name): float(value) for name, value in statistics.items()}
            image = row["image"] if "image" in row else row["picture"]  # the key of earlier versions
            if image and str(image).startswith("pictures/") and not (file.parent / str(image)).exists():
                image = f"images/{Path(str(image)).name}"  # a server of this version renamed the folder
            text_values = {"model": str(row["model"]), "image": image and str(image)}
        except (ValueError, TypeError, KeyError):
            continue
        rows.append({**text_values, "confidence": confidence, "answered": answered, "statistics": numbers})
    return rows
