"""Apply the state of a label history to a data set: corrected labels, excluded and added samples."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from refract.pipeline.config.config import ConfigError
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.data.scan import Scan, scan
from refract.pipeline.data.sources.folders import label_of
from refract.pipeline.labels.address import opened, split_address
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.labels.state import ImageState, LabelState

if TYPE_CHECKING:
    from collections.abc import Iterable

SHOWN = 10
"""Pairs of labels that a summary names, the most frequent first."""

Names = tuple[str, ...]


@dataclass(frozen=True)
class AppliedLabels:
    """What decisions changed in a data set, in images; copies of an image count once.

    contents: the contents of the images with an applied decision; digest: SHA-256 of these decisions, independent of reviewers, times and
    paths; corrected: (labels before, labels now) → images; not_applied: one line for each decision without its image; conflicts: images
    with conflicting decisions.
    """

    contents: frozenset[str]
    digest: str
    corrected: Mapping[tuple[str, str], int]
    confirmed: int
    added: int
    excluded: int
    not_applied: tuple[str, ...] = ()
    conflicts: int = 0

    @property
    def count(self) -> int:
        """Number of applied decisions."""
        return sum(self.corrected.values()) + self.confirmed + self.added + self.excluded

    def text(self) -> str:
        """Summarise the decisions: `12 decisions: 8 corrected (cat → dog 5, dog → cat 3), 1 added, 2 excluded, 1 confirmed`."""
        corrected = sum(self.corrected.values())
        parts = [
            f"{corrected:,} corrected ({listed_pairs(self.corrected)})" if corrected else "",
            f"{self.added:,} added" if self.added else "",
            f"{self.excluded:,} excluded" if self.excluded else "",
            f"{self.confirmed:,} confirmed" if self.confirmed else "",
        ]
        return f"{self.count:,} decision{'s' * (self.count != 1)}" + (
            f": {', '.join(part for part in parts if part)}" if self.count else ""
        )

    def identity(self) -> dict[str, str]:
        """Return the entries of a data set's identity. MLflow accepts tags of limited length."""
        return {"label_state": self.digest, "label_decisions": str(self.count), "label_changes": self.text()[:2000]}


def listed_pairs(pairs: Mapping[tuple[str, str], int]) -> str:
    """List (from, to) → count, the most frequent first: `cat → dog 5, dog → cat 3, and 4 others`."""
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[SHOWN:])
    shown = [f"{old or 'no label'} → {new or 'no label'} {count:,}" for (old, new), count in ordered[:SHOWN]]
    return ", ".join([*shown, *([f"and {rest:,} others"] if rest else [])])


def apply_labels(
    labels: str, task: str, manifest: Manifest, scanned: Scan, reads: frozenset[str]
) -> tuple[Manifest, Scan, AppliedLabels]:
    """Apply the history of `data.labels` to the readable samples of a source.

    task: `data.task`; scanned: the scan of the samples; reads: as for `scan`. Returns the manifest, with new classes in its sorted labels
    and without classes that lost all samples; the scan of its samples; and a summary. Samples keep the splits of the source; added ones
    have none.
    ConfigError or LabelError for a database that cannot be used, or for decisions that do not fit `data.task`.
    """
    address, number = split_address(labels)
    assert address is not None
    history = opened(address)
    state = history.state(until=number)
    if number is not None and state.last < number and not history.decisions(since=number):
        raise ConfigError(
            f"data.labels: {history.address} ends with decision {state.last}, before decision {number}; restore the database, or "
            f"apply it as it is by data.labels: {history.address}"
        )
    contents = {s.key: scanned.images[s.path] for s in manifest.samples if s.has_image and s.path in scanned.images}
    present = {*contents.values()}
    added, refused, scanned = _added(history, state, present, scanned, reads)
    applied = {content: one for content, one in state.images.items() if content in present or content in added}
    absent = [one for content, one in state.images.items() if content not in applied and content not in refused]
    _check_task(address, manifest, applied.values())
    names, corrected, confirmed = _names(manifest, contents, applied)
    samples = [sample for sample in manifest.samples if sample.key in names]
    for content, sample in added.items():
        samples.append(sample)
        names[sample.key] = applied[content].applied.effect[1]
    summary = AppliedLabels(
        frozenset(applied),
        _digest(applied),
        corrected,
        confirmed,
        len(added),
        sum(not one.applied.effect[0] for one in applied.values()),
        (*refused.values(), *_absences(history, absent, manifest)),
        len(state.conflicts()),
    )
    return _relabelled(manifest, samples, names, task), scanned, summary


def _added(
    history: LabelHistory, state: LabelState, present: set[str], scanned: Scan, reads: frozenset[str]
) -> tuple[dict[str, Sample], dict[str, str], Scan]:
    """Read the added images that the source lacks. Returns (content → sample, content → why it is refused, the scan with them)."""
    new = {
        content: Sample(history.file(one.added.path), ())
        for content, one in state.images.items()
        if one.added is not None and one.applied.effect[0] and content not in present
    }
    if not new:
        return {}, {}, scanned
    if "images" not in reads:
        raise ConfigError("data.labels: its decisions add images, but the network reads only texts")
    scan_of_new = scan(list(new.values()), reads=reads)
    refused = {}
    for content, sample in new.items():
        number = state.images[content].applied.id
        if sample.path in scan_of_new.bad:
            refused[content] = f"decision {number}: {sample.path} cannot be read ({scan_of_new.bad[sample.path]})"
        elif scan_of_new.images[sample.path] != content:
            refused[content] = f"decision {number}: the bytes of {sample.path} have changed"
    accepted = {content: sample for content, sample in new.items() if content not in refused}
    return accepted, refused, scanned.joined(scan_of_new, [sample.key for sample in accepted.values()])


def _absences(history: LabelHistory, absent: "Iterable[ImageState]", manifest: Manifest) -> "Iterable[str]":
    """Yield why each decision without its image in the source is not applied; nothing for an excluded image that was removed."""
    decisions = [one.applied for one in absent]
    names = {Path(decision.path).name for decision in decisions}
    paths = {path_of(history, sample) for sample in manifest.samples if Path(sample.path).name in names}
    for decision in decisions:
        if decision.path in paths:
            yield f"decision {decision.id}: the bytes of {decision.path} have changed"
        elif decision.effect[0]:
            yield f"decision {decision.id}: {decision.path} is not in {manifest.source}"


def path_of(history: LabelHistory, sample: Sample) -> str:
    """Return the path of a sample for a decision."""
    return history.relative(sample.path) if sample.data is None else sample.path


def _check_task(address: str, manifest: Manifest, applied: "Iterable[ImageState]") -> None:
    """Raise ConfigError for a decision without exactly one label, unless the task is multilabel."""
    if manifest.task == "multilabel":
        return
    for decision in (one.applied for one in applied):
        if decision.effect[0] and len(decision.labels) != 1:
            raise ConfigError(
                f"data.labels: {address}, decision {decision.id}: {decision.path} has the labels "
                f"{';'.join(decision.labels)!r}, but the task is {manifest.task}, with one label for each image; undo the decision, "
                "or set data.task: multilabel"
            )


def _names(
    manifest: Manifest, contents: Mapping[str, str], applied: Mapping[str, ImageState]
) -> tuple[dict[str, Names], Counter[tuple[str, str]], int]:
    """Return (sample key → label names of each sample that is not excluded, (before, now) → corrected images, confirmed images)."""
    names: dict[str, Names] = {}
    corrected: dict[str, tuple[str, str]] = {}
    confirmed: set[str] = set()
    for sample in manifest.samples:
        before = tuple(manifest.labels[i] for i in sample.labels)
        content = contents.get(sample.key, "")
        if content not in applied:
            names[sample.key] = before
            continue
        included, now = applied[content].applied.effect
        if not included:
            continue
        names[sample.key] = now
        if now != tuple(sorted(before)):
            corrected[content] = (";".join(before), ";".join(now))
        else:
            confirmed.add(content)
    return names, Counter(corrected.values()), len(confirmed - corrected.keys())


def _relabelled(manifest: Manifest, samples: Sequence[Sample], names: Mapping[str, Names], task: str) -> Manifest:
    """Return the manifest with the samples and their labels. Classes that the source lists without samples stay."""
    without_samples = {label for label, count in manifest.counts().items() if count == 0}
    labels = tuple(sorted(without_samples.union(*names.values())))
    if task == "binary" and len(labels) != 2:
        raise ConfigError(
            f"data.labels: with the decisions, the data has {len(labels)} classes: {', '.join(labels[:10])}; "
            "set data.task: multiclass"
        )
    by_count = task == "auto" and manifest.task != "multilabel"
    task = ("binary" if len(labels) == 2 else "multiclass") if by_count else manifest.task
    index = {label: i for i, label in enumerate(labels)}
    relabelled = (replace(sample, labels=tuple(index[name] for name in names[sample.key])) for sample in samples)
    filled = {label for sample in samples for label in names[sample.key]}
    empty = tuple(folder for folder in manifest.empty if label_of(Path(folder).name) not in filled)
    return replace(manifest, samples=tuple(relabelled), labels=labels, task=task, empty=empty)


def _digest(applied: Mapping[str, ImageState]) -> str:
    lines = sorted(json.dumps([content, *one.applied.effect]) for content, one in applied.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
