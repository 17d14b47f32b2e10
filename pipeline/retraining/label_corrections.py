"""The corrections that a retraining run takes in: the images whose labels decisions changed since the champion was trained."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refract.pipeline.config.sections import TrackingConfig
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.data.scan import Scan
from refract.pipeline.labels.address import opened, split_address
from refract.pipeline.labels.apply import SHOWN
from refract.pipeline.labels.difference import ABSENT, EXCLUDED, ChangedImage, difference
from refract.pipeline.tracking.address import absolute, sqlite_path, tracking_uri
from refract.pipeline.tracking.aliases import CHAMPION
from refract.pipeline.tracking.model_registry import registry_of

TAG = "label_decision"
"""A version's tag with the ID of the last decision that its training took in."""


@dataclass(frozen=True)
class TakenIn:
    """images: those whose labels differ, in the order of the decisions; since, until: IDs of the last decisions of champion and run."""

    since: int
    until: int
    images: tuple[ChangedImage, ...]

    def record(self) -> dict[str, Any]:
        """Return the entry of the run's record: counts, pairs (the most frequent first) and the newest examples."""
        pairs = Counter((image.before, image.after) for image in self.images).most_common(100)
        examples = [
            {"path": one.path, "before": one.before, "after": one.after} for one in self.images[: -SHOWN - 1 : -1]
        ]
        return {
            "since": self.since,
            "until": self.until,
            "count": len(self.images),
            "summary": self.text(),
            "pairs": [{"before": before, "after": after, "count": count} for (before, after), count in pairs],
            "examples": examples,
        }

    def text(self) -> str:
        count, pairs = len(self.images), Counter((one.before, one.after) for one in self.images)
        ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
        listed = ", ".join(f"{before} → {after} {number:,}" for (before, after), number in ordered[:SHOWN])
        rest = sum(number for _, number in ordered[SHOWN:])
        others = f", and {rest:,} others" if rest else ""
        since = f" since the champion (decision {self.since})" if self.since else ""
        return f"{count:,} image{'s' * (count != 1)} corrected{since}" + (f": {listed}{others}" if listed else "")


def decision_of_champion(tracking: TrackingConfig) -> int:
    """Return the ID of the last decision that the champion was trained with, 0 without a champion or decisions.

    A retraining run tags its version with the ID; the config of `refract train`, in MLflow, has it in `data.labels`.
    """
    database = sqlite_path(absolute(tracking_uri(tracking)))
    if database and not database.exists():
        return 0
    client, name, aliases = registry_of(tracking)
    champion = aliases.get(CHAMPION)
    if champion is None:
        return 0
    version = client.get_model_version(name, champion)
    if TAG in version.tags:
        return int(version.tags[TAG])
    from mlflow.exceptions import MlflowException

    try:
        labels = client.get_run(version.run_id).data.params.get("data.labels") if version.run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return 0
    return split_address(labels)[1] or 0


def taken_in(labels: str, source: Manifest, scanned: Scan, since: int) -> TakenIn:
    """Compare the decisions after `since` with those of the run. Raises as `apply_labels`.

    labels: `data.labels`; source: the data without decisions.
    """
    address, until = split_address(labels)
    assert address is not None
    history = opened(address)
    now = history.state(until=until)
    since = min(since, now.last)
    samples = {scanned.images[s.path]: s for s in source.samples if s.has_image and s.path in scanned.images}
    images = difference(history.state(until=since), now, source, samples).images
    return TakenIn(since, now.last, images)


def without(whole: Manifest, source: Manifest, scanned: Scan, taken: TakenIn) -> Manifest | None:
    """Return the run's data with the labels as they were before the corrections; None if they change no sample outside the holdout.

    whole: the run's data with splits; source: the data without decisions. Added images are removed, and excluded ones train. Samples of the
    test set stay as they are, but for labels that no training image has.
    """
    before = {image.content: image.before for image in taken.images}
    held = {Path(sample.path).stem for sample in whole.samples if sample.split == "test" and sample.has_image}
    rows: list[tuple[Sample, tuple[str, ...]]] = []
    changed = False
    for sample in whole.samples:
        names = tuple(whole.labels[i] for i in sample.labels)
        earlier = before.get(_content(sample, scanned)) if sample.split != "test" else None
        changed |= earlier is not None
        if earlier not in (ABSENT, EXCLUDED):
            rows.append((sample, names if earlier is None else _names(earlier, whole.task)))
    excluded = {image.content for image in taken.images if image.after == EXCLUDED} - held
    for sample in source.samples:
        earlier = before.get(_content(sample, scanned))
        if _content(sample, scanned) in excluded and earlier not in (None, ABSENT):
            rows.append((replace(sample, split="train"), _names(str(earlier), whole.task)))
            changed = True
    if not changed:
        return None
    trained = {name for sample, names in rows if sample.split == "train" for name in names}
    rows = [(sample, names) for sample, names in rows if trained.issuperset(names)]
    labels = tuple(sorted(trained))
    index: Mapping[str, int] = {label: i for i, label in enumerate(labels)}
    samples = tuple(replace(sample, labels=tuple(index[name] for name in names)) for sample, names in rows)
    return replace(whole, samples=samples, labels=labels)


def _content(sample: Sample, scanned: Scan) -> str:
    """Return the SHA-256 of an image of the source; empty for other samples, such as copies in the holdout."""
    return scanned.images.get(sample.path, "") if sample.has_image else ""


def _names(labels: str, task: str) -> tuple[str, ...]:
    return tuple(filter(None, labels.split(";"))) if task == "multilabel" else (labels,)
