"""What a server sampled of its inputs (`refract serve --sample DIR`), read as a profile. The server writes it, and knows nothing of drift.

`inputs-*.jsonl` has a row for each sampled image: time, model (16 digits of the bundle's digest), answered (labels), confidence,
statistics (name → number), image (a file below the folder, kept where confidence was low) or null.
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
    return folder.is_dir() and any(folder.glob(ROWS))


def read_log(folder: Path, info: BundleInfo, digest: str) -> tuple[Profile, list[Sample], int]:
    """(the profile of what this bundle answered, the images that were kept of it, how many rows are another model's).

    A line that a crash cut short is passed over. Images of low confidence are no fair sample, so the profile has no features. DataError.
    """
    rows = [row for file in sorted(folder.glob(ROWS)) for row in _rows(file)]
    own = [row for row in rows if row["model"] == digest[:16]]
    if not own:
        models = Counter(row["model"] for row in rows)
        others = ", ".join(f"{name} ({count})" for name, count in models.most_common(5)) or "nothing"
        raise DataError(f"{folder}: has no inputs of this bundle ({digest[:16]}), but of {others}")
    place = {label: i for i, label in enumerate(info.labels)}
    answered = np.zeros(len(place), np.int64)
    for row in own:
        for label in row["answered"]:
            if label in place:
                answered[place[label]] += 1
    statistics = {
        name: np.array([row["statistics"].get(name, np.nan) for row in own], np.float32)
        for name in STATISTICS if any(name in row["statistics"] for row in own)
    }  # fmt: skip
    confidence = np.array([row["confidence"] for row in own], np.float32)
    kept = [folder / row["image"] for row in own if row["image"]]
    root = folder.resolve()
    samples = [Sample(str(file), ()) for file in kept if file.is_file() and file.resolve().is_relative_to(root)]
    found = Profile(
        len(own), info.labels, None, answered, confidence, statistics, None, info.task == "multilabel"
    )  # fmt: skip
    return found, samples, len(rows) - len(own)


def _rows(file: Path) -> list[dict[str, Any]]:
    found = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            confidence, answered, statistics = float(row["confidence"]), list(row["answered"]), dict(row["statistics"])
            numbers = {str(name): float(value) for name, value in statistics.items()}
            image = row["image"] if "image" in row else row["picture"]  # the key of earlier versions
            whole = {"model": str(row["model"]), "image": image and str(image)}
        except (ValueError, TypeError, KeyError):
            continue
        found.append({**whole, "confidence": confidence, "answered": answered, "statistics": numbers})
    return found
