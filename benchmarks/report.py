"""What every benchmark reports with its measurements: machine, versions, commit."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from refract.pipeline.training.provenance import processor


def summary(values: list[float]) -> dict[str, float]:
    """Return the median, the 95th percentile and the count."""
    p95 = quantiles(values, n=20)[-1] if len(values) > 1 else values[0]
    return {"median": round(median(values), 4), "p95": round(p95, 4), "n": len(values)}


def environment(*packages: str) -> dict[str, Any]:
    """Return machine, core count, commit and the versions of packages (None for a missing package)."""
    return {
        "machine": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": COMMIT,
        "versions": {name: _version(name) for name in packages},
    }


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {path}")


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


COMMIT = _commit()
"""The commit at the start: a benchmark of an hour must not report one that was made meanwhile."""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
