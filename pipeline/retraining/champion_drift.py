"""Measure the drift of data from the champion's reference: `python -m refract.pipeline.retraining.champion_drift CONFIG DATA KNOWN`.

The scheduler's trigger `--on-drift` starts it. The last line of the standard output is a JSON object: `level` (none, warn, stop, or null if
the drift cannot be measured), `summary`, `champion` (its version) and `data` (a digest of the files' names, sizes and times).
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from refract.pipeline import console
from refract.pipeline.config.config import Config, ConfigError, load_config


def main(argv: list[str]) -> int:
    """argv: config file, data, and the last result as JSON, `{}` before the first one."""
    from refract.cli import prepare_to_compute
    from refract.models.credentials import hide_credentials

    config_file, data, known = argv
    hide_credentials()
    prepare_to_compute()

    def measure() -> int:
        print(json.dumps(champion_drift(load_config(config_file), data, json.loads(known)), ensure_ascii=False))
        return 0

    return console.run("schedule --on-drift", measure)


def champion_drift(config: Config, data: str, known: dict[str, Any]) -> dict[str, Any]:
    """Measure the drift of data (see `measure_drift`), with the thresholds `retrain.drift_thresholds`.

    known: the last result, which is returned if neither the data's files nor the champion have changed. ConfigError for thresholds.
    """
    from refract.pipeline.data.errors import DataError
    from refract.pipeline.drift.thresholds import THRESHOLDS, parse_thresholds
    from refract.pipeline.tracking.aliases import CHAMPION
    from refract.pipeline.tracking.model_registry import download, registry_of
    from refract.plugins import load

    load(config.plugins)
    try:
        thresholds = parse_thresholds(config.retrain.drift_thresholds, THRESHOLDS)
    except ValueError as error:
        raise ConfigError(f"retrain.drift_thresholds: {error}") from error
    client, name, aliases = registry_of(config.tracking)
    champion, digest = aliases.get(CHAMPION), digest_of_files(data)
    result: dict[str, Any] = {"level": None, "champion": champion, "data": digest}
    if champion is None:
        return {**result, "summary": "not measured: no champion yet"}
    if digest and known.get("champion") == champion and known.get("data") == digest:
        return known
    from refract.models.bundle.bundle import load_bundle
    from refract.pipeline.drift.measure import measure_drift

    with tempfile.TemporaryDirectory() as downloads:
        bundle = load_bundle(download(client, name, champion, Path(downloads)))
        try:
            drift = measure_drift(bundle, data, thresholds=thresholds, features=Path(config.data.features)).drift
        except DataError as error:  # too few samples, or none of this champion, as after a promotion
            return {**result, "summary": f"not measured: {error}"}
    raised = ", ".join(f"{c.name} {c.effect:.3f} ({c.level})" for c in drift.checks if c.level != "none")
    summary = f"{raised or 'no drift'}, of {drift.count:,} new samples against version {champion}"
    return {**result, "level": drift.level, "summary": summary}


def digest_of_files(data: str) -> str:
    """Return a digest of the names, sizes and times of a folder's files, or of one file; empty if the data are no files of this machine."""
    root = Path(data)
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    lines = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            continue  # removed meanwhile
        lines.append(f"{file} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest() if lines else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
