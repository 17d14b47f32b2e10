"""Checks of a run's data: against the last accepted snapshot, and against the champion (drift and labels)."""

import csv
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.config.retraining_sections import RetrainConfig
from refract.pipeline.data.manifest import DataError, Sample, load_manifest
from refract.pipeline.drift.thresholds import FEWEST, LEVELS, THRESHOLDS, Threshold, parse_thresholds
from refract.pipeline.retraining.champion_data import ChampionData, champion_data
from refract.pipeline.retraining.exact_duplicates import contents
from refract.pipeline.retraining.label_checks import label_changes, level_of, moved_by_decisions
from refract.pipeline.retraining.snapshot import Snapshot
from refract.pipeline.retraining.stored_snapshots import FILES, known_contents
from refract.pipeline.retraining.workspace import Check, CheckedDrift, Workspace, read
from refract.pipeline.tracking.model_registry import download, registry_of

if TYPE_CHECKING:
    from refract.models.bundle.bundle import Bundle
    from refract.pipeline.drift.profile import ProfiledSamples

RELABELLED = "relabelled.csv"
"""In a run's folder: the known samples whose label changed."""


def problems(now: Snapshot, before: Snapshot | None, largest_loss: float, reads: frozenset[str]) -> list[str]:
    """Return the reasons to refuse the data, or an empty list. largest_loss: the fraction of samples that a class, or all, may lose.

    Samples that decisions in the label history relabelled or excluded are not lost. reads: as for `label_changes`.
    """
    if before is None:
        return []
    reasons = []
    if now.task != before.task and {now.task, before.task} != {"binary", "multiclass"}:
        reasons.append(f"the task changed from {before.task} to {now.task}")
    lost = [column for column in before.columns if column not in now.columns]
    if lost:
        reasons.append(f"the manifest lost the columns {', '.join(lost)}")
    counts, earlier = _totals(now), _totals(before)
    taken, given = moved_by_decisions(now, before, reads)
    for label, count in [("all classes together", earlier.total()), *sorted(earlier.items())]:
        remaining, moved = counts[label], taken[label]
        if label == "all classes together":
            remaining, moved = counts.total(), taken.total() - given.total()
        remaining += moved
        if count and (count - remaining) / count > largest_loss:
            fewer = f"{(count - remaining) / count:.0%} fewer, at most {largest_loss:.0%} is accepted"
            reasons.append(
                f"{label}: {remaining:,} samples outside the holdout, {count:,} in the last accepted run ({fewer})"
                + (f", with {moved:,} that decisions have moved" if moved > 0 else "")
            )
    return reasons


def _totals(snapshot: Snapshot) -> Counter[str]:
    """Return label → number of training and validation samples. The holdout does not change with the data."""
    total: Counter[str] = Counter()
    for split, counts in snapshot.counts.items():
        if split != "test":
            total.update(counts)
    return total


def changed_labels(
    retrain: RetrainConfig, reads: frozenset[str], now: Snapshot, before: Snapshot, folder: Path
) -> Check:
    """Report known content whose label changed since the last accepted run: `level` (none, warn or stop), `summary`, and numbers.

    From level warn on, `folder` gets `relabelled.csv`, the list of all such samples, and the record names it as `file`.
    """
    changes = label_changes(now, before, reads)
    record = changes.record(Threshold(retrain.relabelled_warn, retrain.relabelled_stop))
    if record["level"] == "none":
        return record
    changes.write(folder / RELABELLED)
    return {**record, "file": str(folder / RELABELLED)}


def compared_with_champion(
    config: Config, now: Snapshot, workspace: Workspace, folder: Path
) -> tuple[Check | None, Check | None]:
    """Compare the samples that are new since the champion's snapshot with the champion.

    Returns (their drift from the champion's reference, the champion's disagreement with their labels). Each has `level` (none, warn or
    stop), `summary`, and numbers; None if the config disables it. The drift report is written to the run's folder.
    ConfigError for invalid thresholds.

    Both use images of classes that the champion knows. Drift reports new classes, which stop a run only by a threshold in
    `retrain.drift_thresholds`. `problems` checks for vanished classes.
    """
    from refract.pipeline.tracking.aliases import CHAMPION

    thresholds = _thresholds(config.retrain)
    by_label = Threshold(config.retrain.disagreement_warn, config.retrain.disagreement_stop)
    enabled = config.retrain.drift != "none", by_label != (None, None)
    client, name, aliases = registry_of(config.tracking)
    champion = aliases.get(CHAMPION)
    if champion is None:
        return _neither(enabled, "no champion yet")
    tag = client.get_model_version(name, champion).tags.get("snapshot")
    before = workspace.snapshot(tag) if tag else None
    listed = None if before is not None and (before / FILES).exists() else champion_data(config, client, champion)
    new = new_samples(now, before, listed)
    if len(new.of_images) < FEWEST:
        return _neither(enabled, f"{new.text()}, too few to compare")
    if not any(enabled):
        return None, None
    from refract.models.bundle.bundle import load_bundle  # imports PyTorch, which most runs do not need here

    with tempfile.TemporaryDirectory() as downloads:
        bundle = load_bundle(download(client, name, champion, Path(downloads)))
        stops = config.retrain.drift == "stop"
        new_drift = NewDrift(None, None)
        if enabled[0]:
            store = Path(config.data.features)
            new_drift = drift_of_new(bundle, new, thresholds, folder, stops=stops, features=store)
        labels = disagreed(bundle, now, new, new_drift.profiled, by_label) if enabled[1] else None
        return new_drift.drift, labels and lowered_if_drifted(labels, new_drift.drift)


def _neither(enabled: tuple[bool, bool], why: str) -> tuple[Check | None, Check | None]:
    drift, labels = enabled
    return _drift_not_compared(why) if drift else None, _labels_not_compared(why) if labels else None


def disagreed(
    bundle: "Bundle", now: Snapshot, new: "New", profiled: "ProfiledSamples | None", threshold: Threshold
) -> Check:
    """Report the champion's disagreement with the new labels, as in `compared_with_champion`.

    profiled: the champion's predictions if the drift check computed them.
    """
    from refract.pipeline.data.new_data import MOST
    from refract.pipeline.retraining.label_checks import disagreement

    known = set(bundle.info.labels)
    rows = [(sample, labels) for sample, labels in new.of_images if known.issuperset(labels)]
    try:
        result = disagreement(bundle, now, rows, profiled, MOST)
    except DataError as error:
        return _labels_not_compared(str(error))
    if result is None:
        return _labels_not_compared(f"fewer than {FEWEST} are of classes that the champion knows")
    return result.record(threshold)


def lowered_if_drifted(disagreement: Check, drift: Check | None) -> Check:
    """Lower the disagreement to a warning if the images' features drifted, as the champion cannot judge labels of unfamiliar images."""
    features = None if drift is None else drift.get("checks", {}).get("features")
    if disagreement["level"] != "stop" or features is None or features["level"] == "none":
        return disagreement
    reason = "; a warning only, as the images drifted"
    return {**disagreement, "level": "warn", "summary": disagreement["summary"] + reason}


def _labels_not_compared(why: str) -> Check:
    return {"level": "none", "summary": f"new labels not compared with the champion: {why}"}


def _thresholds(retrain: RetrainConfig) -> dict[str, Threshold]:
    defaults = {**THRESHOLDS, "new classes": Threshold(0.0, None), "vanished classes": Threshold(None, None)}
    try:
        return parse_thresholds(retrain.drift_thresholds, defaults)
    except ValueError as error:
        raise ConfigError(f"retrain.drift_thresholds: {error}") from error


@dataclass(frozen=True)
class New:
    """of_images: (sample, its labels) for samples with an image; texts: number of other samples, which drift does not check; doubt: why
    some may not be new, or empty."""

    of_images: list[tuple[Sample, list[str]]]
    texts: int
    doubt: str = ""

    def text(self) -> str:
        others = f", and {self.texts:,} texts without an image, which are not compared" if self.texts else ""
        return f"{len(self.of_images):,} new images{others}{self.doubt and f' ({self.doubt})'}"


def new_samples(now: Snapshot, before: Path | None, champion: ChampionData | None = None) -> New:
    """Return the snapshot's training and validation samples that are new to the champion.

    before: folder of the champion's snapshot; champion: the sample list of its run, used without that folder. Without both, all
    samples are returned.
    """
    learned, doubt = set[str](), "the champion's training data are unknown"
    if before is not None and (before / FILES).exists():
        learned, doubt = {*read(before / FILES).values(), *(known_contents(before) or ())}, ""
    elif champion is not None:
        learned = {*champion.trained, *champion.tested}
        doubt = f"{champion.missing:,} training files of the champion are gone" if champion.missing else ""
    manifest, files = load_manifest(now.manifest, now.task), read(now.folder / FILES)
    trained = [sample for sample in manifest.samples if sample.split != "test"]
    images = [sample for sample in trained if sample.has_image and files.get(sample.path) not in learned]
    texts = [sample for sample in trained if not sample.has_image and not contents(sample) & learned]
    return New([(sample, [manifest.labels[i] for i in sample.labels]) for sample in images], len(texts), doubt)


class NewDrift(NamedTuple):
    """drift: as in `compared_with_champion`; profiled: the new samples with the bundle's predictions, None if it has not predicted them."""

    drift: Check | None
    profiled: "ProfiledSamples | None"


def drift_of_new(
    bundle: "Bundle",
    new: New,
    thresholds: Mapping[str, Threshold],
    folder: Path,
    *,
    stops: bool = True,
    features: Path | None = None,
) -> NewDrift:
    """Measure the drift of the new samples from the bundle's reference.

    stops: whether the level stop refuses the run; the text says so. features: see `measure_drift`.
    """
    from refract.pipeline.drift.measure import measure_drift

    known = set(bundle.info.labels)
    rows = [(sample, labels) for sample, labels in new.of_images if known.issuperset(labels)]
    new_classes = sorted({label for _, labels in new.of_images for label in labels} - known)
    fraction = 1 - len(rows) / len(new.of_images)
    checks: dict[str, CheckedDrift] = {}
    if new_classes:
        checks["new classes"] = {"effect": fraction, "level": level_of(fraction, thresholds["new classes"])}
    if len(rows) < FEWEST:
        return NewDrift(
            _drift_not_compared(
                f"{len(rows)} new images are of classes that the champion knows, too few", checks, stops=stops
            ),
            None,
        )
    if bundle.reference() is None:
        return NewDrift(
            _drift_not_compared("the champion's bundle has no reference statistics", checks, stops=stops), None
        )
    _write_rows(rows, folder / "new.csv")
    try:
        measured = measure_drift(bundle, str(folder / "new.csv"), thresholds=thresholds, features=features)
    except DataError as error:
        return NewDrift(_drift_not_compared(str(error), checks, stops=stops), None)
    measured.report.write(folder / "drift")
    drifts: dict[str, CheckedDrift] = {
        check.name: {"effect": check.effect, "level": check.level} for check in measured.drift.checks
    }
    checks = drifts | checks
    without = f", without those of {', '.join(new_classes)}" if new_classes else ""
    summary = f"{_words(checks, stops) or 'none'}, of {new.text()}{without}"
    return NewDrift({"level": _worst(checks), "summary": summary, "checks": checks}, measured.profiled)


def _worst(checks: Mapping[str, CheckedDrift]) -> str:
    return max((check["level"] for check in checks.values()), key=LEVELS.index, default="none")


def _words(checks: Mapping[str, CheckedDrift], stops: bool) -> str:
    words = {"warn": "warn", "stop": "stop" if stops else "large, reported only"}
    raised = [(name, check) for name, check in checks.items() if check["level"] != "none"]
    return ", ".join(f"{name} {check['effect']:.3f} ({words[check['level']]})" for name, check in raised)


def _drift_not_compared(
    why: str, checks: Mapping[str, CheckedDrift] = MappingProxyType({}), *, stops: bool = True
) -> Check:
    summary = "; ".join(filter(None, (_words(checks, stops), f"not compared: {why}")))
    return {"level": _worst(checks) if checks else "none", "summary": summary, "checks": dict(checks)}


def _write_rows(rows: Sequence[tuple[Sample, list[str]]], target: Path) -> None:
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["path", "label", "text"])
        writer.writerows([sample.path, ";".join(labels), sample.text] for sample, labels in rows)
