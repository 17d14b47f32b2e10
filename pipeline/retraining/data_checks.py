"""Whether a night's data may be trained on, beside those of the last night that was accepted."""

import csv
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.data.manifest import DataError, Sample, load_manifest
from refract.pipeline.drift.thresholds import FEWEST, LEVELS, THRESHOLDS, Threshold, parse_thresholds
from refract.pipeline.retraining.champion_data import ChampionData, champion_data
from refract.pipeline.retraining.exact_duplicates import contents
from refract.pipeline.retraining.label_checks import label_changes, level_of
from refract.pipeline.retraining.registry import download, registry_of
from refract.pipeline.retraining.snapshot import FILES, Snapshot, known_contents
from refract.pipeline.retraining.workspace import Workspace, read
from refract.pipeline.training.build import reads

if TYPE_CHECKING:
    from refract.models.bundle.bundle import Bundle
    from refract.pipeline.drift.profile import Seen

RELABELLED = "relabelled.csv"
"""In a run's folder: the known samples whose label changed."""


def problems(now: Snapshot, before: Snapshot | None, largest_loss: float) -> list[str]:
    """In words, why not; empty where they may. largest_loss: share of its images that a class, or the whole, may have lost."""
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
            fewer = f"{(count - left) / count:.0%} fewer, where {largest_loss:.0%} may be"
            found.append(
                f"{label}: {left:,} samples beside the hold-out, {count:,} in the last accepted night ({fewer})"
            )
    return found


def _totals(snapshot: Snapshot) -> Counter[str]:
    """Label → samples that train and validate: the hold-out is kept whatever comes."""
    total: Counter[str] = Counter()
    for split, counts in snapshot.counts.items():
        if split != "test":
            total.update(counts)
    return total


def changed_labels(config: Config, now: Snapshot, before: Snapshot, folder: Path) -> dict[str, Any]:
    """Known content whose label changed since the last accepted night: `level` (none, warn or stop), `told` in words, and the numbers.

    From level warn on, `folder` gets `relabelled.csv`, the list of all such samples, and the record names it as `file`.
    """
    wanted = config.retrain
    changes = label_changes(now, before, reads(config))
    record = changes.record(Threshold(wanted.relabelled_warn, wanted.relabelled_stop))
    if record["level"] == "none":
        return record
    changes.write(folder / RELABELLED)
    return record | {"file": str(folder / RELABELLED)}


def compared_with_champion(
    config: Config, now: Snapshot, place: Workspace, folder: Path
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What is new since the champion's snapshot: (its drift from the champion's reference, the champion's disagreement with its labels).

    Each has `level` (none, warn or stop), `told` in words, and its numbers; None where the config does not ask for it. The drift report
    goes to the night's folder. ConfigError for thresholds that are none.

    Both are of images, and of classes that the champion knows; new classes are told by drift, and stop a night only where
    `retrain.drift_thresholds` says so. Those that vanished are `problems`' matter.
    """
    from refract.pipeline.retraining.aliases import CHAMPION

    thresholds, by_label = _thresholds(config), _by_label(config)
    asked = config.retrain.drift != "none", by_label != (None, None)
    client, name, aliases = registry_of(config)
    champion = aliases.get(CHAMPION)
    if champion is None:
        return _neither(asked, "there is no champion yet")
    tag = client.get_model_version(name, champion).tags.get("snapshot")
    before = place.snapshot(tag) if tag else None
    listed = None if before is not None and (before / FILES).exists() else champion_data(config, client, champion)
    new = new_samples(now, before, listed)
    if len(new.of_images) < FEWEST:
        return _neither(asked, f"{new.text()}, too few to tell anything")
    if not any(asked):
        return None, None
    from refract.models.bundle.bundle import load_bundle  # which brings PyTorch, for nothing on most runs

    with tempfile.TemporaryDirectory() as beside:
        bundle = load_bundle(download(client, name, champion, Path(beside)))
        looked = (
            look(bundle, new, thresholds, folder, stops=config.retrain.drift == "stop")
            if asked[0]
            else Looked(None, None)
        )
        found = disagreed(bundle, now, new, looked.seen, by_label) if asked[1] else None
        return looked.drift, found and excused(found, looked.drift)


def _neither(asked: tuple[bool, bool], why: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    drift, labels = asked
    return _unseen(why) if drift else None, _not_compared(why) if labels else None


def _by_label(config: Config) -> Threshold:
    return Threshold(config.retrain.disagreement_warn, config.retrain.disagreement_stop)


def disagreed(bundle: "Bundle", now: Snapshot, new: "New", seen: "Seen | None", threshold: Threshold) -> dict[str, Any]:
    """The champion's disagreement with the new labels, as in `compared_with_champion`. seen: its predictions, where drift has made them."""
    from refract.pipeline.drift.new_data import MOST
    from refract.pipeline.retraining.label_checks import disagreement

    known = set(bundle.info.labels)
    rows = [(sample, labels) for sample, labels in new.of_images if known.issuperset(labels)]
    try:
        found = disagreement(bundle, now, rows, seen, MOST)
    except DataError as error:
        return _not_compared(str(error))
    if found is None:
        return _not_compared(f"fewer than {FEWEST} are of classes that the champion knows")
    return found.record(threshold)


def excused(disagreement: dict[str, Any], drift: Mapping[str, Any] | None) -> dict[str, Any]:
    """The disagreement as a warning where the features of the images drifted: on unfamiliar images the champion is no judge of labels."""
    features = (drift or {}).get("checks", {}).get("features", {"level": "none"})
    if disagreement["level"] != "stop" or features["level"] == "none":
        return disagreement
    reason = "; a warning only, as the images themselves drifted"
    return {**disagreement, "level": "warn", "told": disagreement["told"] + reason}


def _not_compared(why: str) -> dict[str, Any]:
    return {"level": "none", "told": f"new labels not compared with the champion: {why}"}


def _thresholds(config: Config) -> dict[str, Threshold]:
    own = {**THRESHOLDS, "new classes": Threshold(0.0, None), "vanished classes": Threshold(None, None)}
    try:
        return parse_thresholds(config.retrain.drift_thresholds, own)
    except ValueError as error:
        raise ConfigError(f"retrain.drift_thresholds: {error}") from error


@dataclass(frozen=True)
class New:
    """of_images: (sample, its labels) of those with an image; texts: how many others, which drift does not look at; doubt: why some may
    not be new, or empty."""

    of_images: list[tuple[Sample, list[str]]]
    texts: int
    doubt: str = ""

    def text(self) -> str:
        others = f", and {self.texts:,} texts without one, which are not looked at" if self.texts else ""
        return f"{len(self.of_images):,} new images{others}{self.doubt and f' ({self.doubt})'}"


def new_samples(now: Snapshot, before: Path | None, champion: ChampionData | None = None) -> New:
    """What the snapshot trains and validates on, but not what the champion knows: by its snapshot's folder `before`, or by `champion`, the
    list of its run. All, where neither is there."""
    learned, doubt = set[str](), "those that the champion was trained on are unknown"
    if before is not None and (before / FILES).exists():
        learned, doubt = {*read(before / FILES).values(), *(known_contents(before) or ())}, ""
    elif champion is not None:
        learned = {*champion.trained, *champion.tested}
        doubt = f"{champion.missing:,} files that the champion was trained on are gone" if champion.missing else ""
    manifest, files = load_manifest(now.manifest, now.task), read(now.folder / FILES)
    own = [sample for sample in manifest.samples if sample.split != "test"]
    images = [sample for sample in own if sample.has_image and files.get(sample.path) not in learned]
    texts = [sample for sample in own if not sample.has_image and not contents(sample) & learned]
    return New([(sample, [manifest.labels[i] for i in sample.labels]) for sample in images], len(texts), doubt)


class Looked(NamedTuple):
    """drift: as in `compared_with_champion`; seen: the new samples with the bundle's predictions, None where it made none."""

    drift: dict[str, Any] | None
    seen: "Seen | None"


def look(
    bundle: "Bundle", new: New, thresholds: Mapping[str, Threshold], folder: Path, *, stops: bool = True
) -> Looked:
    """The drift of that which is new from the bundle's reference. stops: whether the level stop ends the run, as the words then say."""
    from refract.pipeline.drift.measure import measure_drift

    known = set(bundle.info.labels)
    rows = [(sample, labels) for sample, labels in new.of_images if known.issuperset(labels)]
    strange = sorted({label for _, labels in new.of_images for label in labels} - known)
    share = 1 - len(rows) / len(new.of_images)
    checks = {"new classes": {"effect": share, "level": level_of(share, thresholds["new classes"])}} if strange else {}
    if len(rows) < FEWEST:
        return Looked(
            _unseen(f"{len(rows)} new images are of classes that the champion knows, too few", checks, stops=stops),
            None,
        )
    if bundle.reference() is None:
        return Looked(_unseen("the champion's bundle has no reference", checks, stops=stops), None)
    _write_rows(rows, folder / "new.csv")
    try:
        found = measure_drift(bundle, str(folder / "new.csv"), thresholds=thresholds)
    except DataError as error:
        return Looked(_unseen(str(error), checks, stops=stops), None)
    found.report.write(folder / "drift")
    checks = {check.name: {"effect": check.effect, "level": check.level} for check in found.drift.checks} | checks
    without = f", without those of {', '.join(strange)}" if strange else ""
    told = f"{_words(checks, stops) or 'none'}, of {new.text()}{without}"
    return Looked({"level": _worst(checks), "told": told, "checks": checks}, found.seen)


def _worst(checks: Mapping[str, Mapping[str, Any]]) -> str:
    return max((check["level"] for check in checks.values()), key=LEVELS.index, default="none")


def _words(checks: Mapping[str, Mapping[str, Any]], stops: bool) -> str:
    words = {"warn": "warn", "stop": "stop" if stops else "large, reported only"}
    told = [(name, check) for name, check in checks.items() if check["level"] != "none"]
    return ", ".join(f"{name} {check['effect']:.3f} ({words[check['level']]})" for name, check in told)


def _unseen(
    why: str, checks: Mapping[str, Mapping[str, Any]] = MappingProxyType({}), *, stops: bool = True
) -> dict[str, Any]:
    told = "; ".join(filter(None, (_words(checks, stops), f"not looked at: {why}")))
    return {"level": _worst(checks) if checks else "none", "told": told, "checks": dict(checks)}


def _write_rows(rows: Sequence[tuple[Sample, list[str]]], target: Path) -> None:
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["path", "label", "text"])
        writer.writerows([sample.path, ";".join(labels), sample.text] for sample, labels in rows)
