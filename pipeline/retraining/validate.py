"""Whether a night's data may be trained on, beside those of the last night that was accepted."""

import csv
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.retraining.place import Place, read
from pipeline.retraining.registry import download, registry_of
from pipeline.retraining.snapshot import FILES, Snapshot


def problems(now: Snapshot, before: Snapshot | None, largest_loss: float) -> list[str]:
    """In words, why not; empty where they may. largest_loss: share of its pictures that a class, or the whole, may have lost."""
    if before is None:
        return []
    found = []
    if now.task != before.task and {now.task, before.task} != {"binary", "multiclass"}:
        found.append(f"the task was {before.task} and is {now.task} now")
    lost = [column for column in before.columns if column not in now.columns]
    if lost:
        found.append(f"the manifest lost the columns {', '.join(lost)}")
    counts, earlier = _totals(now), _totals(before)
    for label, count in [("all classes together", earlier.total()), *sorted(earlier.items())]:
        left = counts.total() if label == "all classes together" else counts[label]
        if count and (count - left) / count > largest_loss:
            found.append(f"{label}: {left:,} samples, {count:,} in the last accepted night")
    return found


def _totals(snapshot: Snapshot) -> Counter[str]:
    """Label → samples that train and validate: the hold-out is kept whatever comes."""
    total: Counter[str] = Counter()
    for split, counts in snapshot.counts.items():
        if split != "test":
            total.update(counts)
    return total


def drift(config: Config, now: Snapshot, place: Place, folder: Path) -> dict[str, Any]:
    """What is new since the champion's snapshot beside the champion's reference: `level` (none, warn or stop), `told` in words, `checks`.
    The report goes to the night's folder. ConfigError for thresholds that are none.

    New classes do not stop a night: those that vanished and those that are new are other checks' matter.
    """
    from pipeline.drift.thresholds import THRESHOLDS, Threshold, parse_thresholds
    from pipeline.retraining.aliases import CHAMPION

    own = {**THRESHOLDS, "new classes": Threshold(0.0, None), "vanished classes": Threshold(None, None)}
    try:
        thresholds = parse_thresholds(config.retrain.drift_thresholds, own)
    except ValueError as error:
        raise ConfigError(f"retrain.drift_thresholds: {error}") from error
    client, name, aliases = registry_of(config)
    champion = aliases.get(CHAMPION)
    if champion is None:
        return _unseen("there is no champion yet")
    known = client.get_model_version(name, champion).tags.get("snapshot")
    seen = place.snapshot(known) / FILES if known else None
    learned = set(read(seen).values()) if seen is not None and seen.exists() else set()
    new = [path for path, digest in read(now.folder / FILES).items() if digest not in learned]
    from pipeline.drift.compare import FEWEST

    if len(new) < FEWEST:
        return _unseen(f"{len(new)} pictures are new, too few to tell anything")
    from models.bundle import load_bundle  # which brings PyTorch, for nothing on most nights
    from pipeline.drift.measure import measure_drift

    table = folder / "new.csv"
    _write_rows(now.manifest, set(new), table)
    with tempfile.TemporaryDirectory() as beside:
        bundle = load_bundle(download(client, name, champion, Path(beside)))
        if bundle.reference() is None:
            return _unseen("the champion's bundle has no reference")
        found = measure_drift(bundle, str(table), thresholds=thresholds)
        found.report.write(folder / "drift")
    told = [f"{check.name} {check.effect:.3f} ({check.level})" for check in found.drift.checks if check.level != "none"]
    checks = {check.name: {"effect": check.effect, "level": check.level} for check in found.drift.checks}
    words = ", ".join(told) or "none"
    return {"level": found.drift.level, "told": f"{words}, of {len(new):,} new pictures", "checks": checks}


def _unseen(why: str) -> dict[str, Any]:
    return {"level": "none", "told": f"not looked at: {why}", "checks": {}}


def _write_rows(manifest: Path, paths: set[str], target: Path) -> None:
    with manifest.open(newline="", encoding="utf-8") as source, target.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictReader(source)
        writer = csv.DictWriter(file, ["path", "label", "text"], extrasaction="ignore", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(row for row in rows if row["path"] in paths)
