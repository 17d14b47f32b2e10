"""Snapshots: the data of a retraining run, identified by content, so that later runs can compare and train on them."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from refract.cores import mapped
from refract.pipeline.config.config import Config
from refract.pipeline.config.defaults import filled
from refract.pipeline.config.sections import DataConfig
from refract.pipeline.data.manifest import DataError, Manifest, Sample, load_manifest
from refract.pipeline.data.prepare import with_labels
from refract.pipeline.data.scan import Scan, scan
from refract.pipeline.data.sources.folders import skipped_lines
from refract.pipeline.data.splits import draw_splits, write_splits
from refract.pipeline.data.storage import absolute
from refract.pipeline.data.validation import check_classes, check_inputs, drop_bad, drop_contradictory, drop_shared
from refract.pipeline.retraining import holdout
from refract.pipeline.retraining.champion_data import ChampionData
from refract.pipeline.retraining.exact_duplicates import contents, without_copies
from refract.pipeline.retraining.holdout import (
    FILES_AT_ONCE,
    Holdout,
    as_test_samples,
    freeze,
    frozen,
    hash_of,
    named,
    renamed,
)
from refract.pipeline.retraining.holdout_versions import (
    Corrections,
    as_in_source,
    content_of_copy,
    content_of_file,
    corrected,
    frozen_digest,
    propose,
    record_version,
)
from refract.pipeline.retraining.stored_snapshots import (
    CONTENTS,
    DECIDED,
    FILES,
    PROPOSED,
    RECORD,
    TABLE,
    WITHOUT_TABLE,
    trained_before,
)
from refract.pipeline.retraining.workspace import Workspace, read, write
from refract.pipeline.training.provenance import inputs

if TYPE_CHECKING:
    from refract.pipeline.labels.apply import AppliedLabels
    from refract.pipeline.retraining.label_corrections import TakenIn

log = logging.getLogger(__name__)

Draw = Callable[[Manifest], Manifest]
"""`draw_splits` with the fractions and the seed of the config."""


@dataclass(frozen=True)
class Snapshot:
    """folder: contains `manifest.csv`, the training data; `files.json`, each file's SHA-256; `contents.json`, the digests that identify
    the samples; and `snapshot.json`, this record.

    digest: SHA-256 of content, labels and splits; holdout: its version; counts: split → label → samples; columns: names of the
    metadata columns; skipped: number of unreadable images without a row in the table; labels: the state of the label history, empty without
    `data.labels`; corrections: since the champion, which are no part of the record, as the champion may change.
    """

    folder: Path
    digest: str
    holdout: str
    task: str
    counts: dict[str, dict[str, int]]
    columns: tuple[str, ...]
    skipped: int
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    corrections: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def manifest(self) -> Path:
        return self.folder / TABLE

    def record(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "holdout": self.holdout,
            "task": self.task,
            "counts": self.counts,
            "columns": list(self.columns),
            "skipped": self.skipped,
            **({"labels": dict(self.labels)} if self.labels else {}),
        }


def take(
    config: Config,
    workspace: Workspace,
    champion: ChampionData | None = None,
    splits: Mapping[str, str] = MappingProxyType({}),
    since: int | None = None,
) -> Snapshot:
    """Read every image, exclude the holdout, draw the validation split, and write the snapshot. DataError for unusable data.

    The holdout is `gate.holdout`, or the first run's test split (the data's own, else drawn). For classes that it lacks, it gets images
    that no run has trained on. Neither its copies in the data nor other images of the data's own test split are trained on.

    champion: the data of a champion of `refract train`. The first holdout then takes images of its test split, and none of its
    training split. splits: content → `train` or `val`, of samples that keep this split, unless the data has a validation split. since: ID
    of the last decision that the champion took in, for the list of corrections; None without a label history.
    """
    source, manifest, scanned, applied = _scanned(config.data, config.reads)
    kind = "multilabel" if manifest.task == "multilabel" else "multiclass"
    current = frozen(workspace.holdout, kind)
    configured = named(config.gate.holdout, workspace.holdout, kind, current, config.reads)
    manifest, trained_labels = _without_copies_of_other_labels(manifest, scanned, current)
    known = current.manifest if current else configured
    version = None
    if known is not None:
        content_of = content_of_copy if current else content_of_file
        known_holdout = Holdout(known, current.digest if current else "")
        version = corrected(config.data.labels, known_holdout, trained_labels, content_of)[0]
    labels = tuple(sorted({*manifest.labels, *(version.manifest.labels if version else ())}))
    task = "multiclass" if manifest.task == "binary" and len(labels) > 2 else manifest.task
    data = replace(manifest, samples=tuple(renamed(manifest, labels)), labels=labels, task=task)
    held = as_test_samples(version.manifest, labels) if version else []
    draw: Draw = partial(
        draw_splits,
        hashes=scanned.groups,
        val_fraction=config.data.val_fraction,
        test_fraction=config.data.test_fraction,
        seed=config.trainer.seed,
    )
    added = _lacking(data, held, scanned, workspace, champion, config.reads, draw)
    held = [*held, *added]
    copies = [*(known.samples if known else ()), *added]  # with the excluded ones
    pool = without_copies([s for s in data.samples if s.split != "test"], copies, scanned, config.reads)
    whole = data.with_samples([*pool, *held])
    whole = _with_splits(whole, scanned, splits, draw)
    trained = whole.with_samples([sample for sample in whole.samples if sample.split != "test"])
    trained = drop_shared(trained, scanned, config.data.on_bad_file)
    check_classes(trained.with_samples([*trained.samples, *held]))
    if current is None or added:
        new = as_in_source(data.with_samples(added), source, scanned.images, trained_labels)
        frozen_labels = tuple(sorted({*new.labels, *(configured.labels if configured else ())}))
        added = [s for one in (configured, new) if one for s in as_test_samples(one, frozen_labels)]
        current = freeze(workspace.holdout, frozen_labels, added, kind, configured)
    version, corrections = corrected(config.data.labels, current, trained_labels)
    _report(corrections)
    propose(workspace.holdout, version, current, config.data.labels, corrections)
    whole = trained.with_samples([*trained.samples, *as_test_samples(version.manifest, labels)])
    snapshot = _written(workspace, whole, version, scanned, applied)
    if since is None or config.data.labels is None:
        return snapshot
    from refract.pipeline.retraining.label_corrections import taken_in, without

    taken = taken_in(config.data.labels, source, scanned, since)
    without_them = without(whole, source, scanned, taken) if config.retrain.effect_of_labels else None
    return _with_corrections(snapshot, taken, without_them)


def _with_corrections(snapshot: Snapshot, taken: "TakenIn", without_them: Manifest | None) -> Snapshot:
    """Return the snapshot with the corrections since the champion, and write the data without them if the run needs these."""
    table = snapshot.folder / WITHOUT_TABLE
    table.unlink(missing_ok=True)
    if without_them is not None:
        write_splits(_on_disk(without_them, snapshot.folder), table)
    return replace(snapshot, corrections=taken.record())


def _without_copies_of_other_labels(
    manifest: Manifest, scanned: Scan, held: Holdout | None
) -> tuple[Manifest, frozenset[str]]:
    """Exclude the source's copies of held-out images whose labels no other image has, and these labels.

    Returns (the manifest, the labels of the samples that may be trained on: outside the data's own test split, and no copies).
    """
    files = {Path(sample.path).stem for sample in held.manifest.samples if sample.has_image} if held else set()
    copies = {s.key for s in manifest.samples if s.has_image and scanned.images.get(s.path) in files}
    trained = _labels_of(s for s in manifest.samples if s.split != "test" and s.key not in copies)
    rest = [s for s in manifest.samples if s.key not in copies or trained.issuperset(s.labels)]
    gone = _labels_of(manifest.samples) - _labels_of(rest)
    index = {old: new for new, old in enumerate(i for i in range(len(manifest.labels)) if i not in gone)}
    samples = tuple(replace(s, labels=tuple(index[i] for i in s.labels)) for s in rest)
    labels = tuple(manifest.labels[i] for i in index)
    return replace(manifest, samples=samples, labels=labels), frozenset(manifest.labels[i] for i in trained)


def _report(corrections: Corrections) -> None:
    """Log what decisions change in the frozen holdout."""
    if corrections.count:
        log.info("holdout: decisions correct %s", corrections.text())
    if corrections.kept:
        log.warning(
            "holdout: decisions whose labels no training image has, and that do not apply: %d", corrections.kept
        )


def _with_splits(whole: Manifest, scanned: Scan, splits: Mapping[str, str], draw: Draw) -> Manifest:
    """Draw the validation split from the samples without an entry in `splits`, content → split."""
    fixed: dict[str, str] = {}
    if "val" not in whole.splits():
        groups = {sample.key: scanned.groups[sample.key] for sample in whole.samples if sample.split in ("", "train")}
        fixed = {key: splits[content] for key, content in groups.items() if content in splits}
    drawn = whole.with_samples([sample for sample in whole.samples if sample.key not in fixed])
    drawn = draw(drawn)
    split_of = {sample.key: sample.split for sample in drawn.samples} | fixed
    return replace(drawn, samples=tuple(replace(sample, split=split_of[sample.key]) for sample in whole.samples))


def _scanned(data: DataConfig, reads: frozenset[str]) -> tuple[Manifest, Manifest, Scan, "AppliedLabels | None"]:
    """Load and check the data, and apply `data.labels`.

    Returns (the readable samples without decisions, the usable samples, the scan of all samples, what decisions changed).
    """
    manifest = load_manifest(data.source, data.task, to_train=data.labels is None)
    for line in (*manifest.notes, *skipped_lines(manifest.skipped)):
        log.warning("data: %s", line)
    check_inputs(manifest, reads)
    scanned = scan(manifest.samples, reads=reads)
    source = drop_bad(manifest, scanned, data.on_bad_file)
    manifest, scanned, applied = with_labels(data, source, scanned, reads)
    return source, drop_contradictory(manifest, scanned, data.on_bad_file), scanned, applied


def _lacking(
    data: Manifest,
    held: Sequence[Sample],
    scanned: Scan,
    workspace: Workspace,
    champion: ChampionData | None,
    reads: frozenset[str],
    draw: Draw,
) -> list[Sample]:
    """Choose the samples to add to the holdout: the data's own test split if it is empty, then images of each class that it lacks."""
    lacking = set(range(len(data.labels))) - _labels_of(held)
    if held and not lacking:
        return []
    trained: frozenset[str] = trained_before(workspace) if held else champion.trained if champion else frozenset()
    candidates = [sample for sample in data.samples if not held or lacking & set(sample.labels)]
    seen = {sample.key for sample in candidates if trained and trained & contents(sample)}
    fresh = without_copies([sample for sample in candidates if sample.key not in seen], held, scanned, reads)
    drawing = not held and "test" not in data.splits()
    if drawing and champion:
        fresh = [replace(s, split="test") if scanned.groups[s.key] in champion.tested else s for s in fresh]
    test_split = [sample for sample in fresh if sample.split == "test"]
    lacking -= _labels_of(test_split)
    rest = [s for s in fresh if s.split != "test" and (drawing or lacking & set(s.labels))]
    drawn = draw(data.with_samples([replace(sample, split="") for sample in rest]))
    added = [*test_split, *drawn.of("test")]
    rare = lacking - _labels_of(added)
    learned = _labels_of(sample for sample in candidates if sample.key in seen)
    refused = rare - learned if held and trained and data.task != "multilabel" else set()
    if refused or not (held or added) or (data.task != "multilabel" and len(_labels_of([*held, *added])) < 2):
        if champion:
            log.warning(
                "data: the holdout includes training images of the champion, as the others are too few; the gate counts them"
            )
            return _lacking(data, held, scanned, workspace, None, reads, draw)
        names = ", ".join(data.labels[i] for i in sorted(refused or rare or lacking))
        raise DataError(
            f"{data.source}: too few images of {names} for a holdout; add some, or raise data.test_fraction"
        )
    if rare:
        log.warning(
            "data: the holdout has no image of %s: too few images are new to all runs; add some",
            ", ".join(data.labels[i] for i in sorted(rare)),
        )
    return added


def _labels_of(samples: Iterable[Sample]) -> set[int]:
    return {label for sample in samples for label in sample.labels}


def accept(workspace: Workspace, snapshot: Snapshot) -> None:
    """Accept the snapshot: its holdout takes effect, and no later holdout gets samples that it trains on."""
    holdout.accept(workspace.holdout, frozen_digest(workspace.holdout, snapshot.holdout))
    record_version(workspace.holdout, snapshot.holdout)
    (snapshot.folder / PROPOSED).unlink(missing_ok=True)


def _written(
    workspace: Workspace, whole: Manifest, held: Holdout, scanned: Scan, applied: "AppliedLabels | None"
) -> Snapshot:
    """Write the snapshot to its folder, the record last. Files of an earlier run are replaced: the same content may have moved."""
    trained = [sample for sample in whole.samples if sample.split != "test"]
    lines = sorted(f"{scanned.hashes[s.key]} {[whole.labels[i] for i in s.labels]} {s.split}" for s in trained)
    digest = hashlib.sha256("\n".join([*lines, held.digest]).encode()).hexdigest()
    folder = workspace.snapshot(digest)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RECORD).exists():
        (folder / PROPOSED).touch()
    columns = tuple(sorted({name for sample in whole.samples for name in sample.metadata}))
    counts = {split: whole.counts(split) for split in whole.splits()}
    labels = {} if applied is None else applied.identity()
    snapshot = Snapshot(folder, digest, held.digest, whole.task, counts, columns, len(scanned.bad), labels)
    known = {"contents": sorted({scanned.groups[sample.key] for sample in trained})}
    write(folder / CONTENTS, known | ({} if applied is None else {DECIDED: sorted(applied.contents)}))
    stored = _on_disk(whole, folder)
    write_splits(stored, folder / TABLE)
    files = [
        pair
        for pair in zip(whole.samples, stored.samples, strict=True)
        if pair[0].split != "test" and pair[0].has_image
    ]
    write(folder / FILES, {absolute(file.path): scanned.images[sample.path] for sample, file in files})
    write(folder / RECORD, snapshot.record())
    return snapshot


def changed(snapshot: Snapshot) -> list[str]:
    """Return the files that are gone, or changed since the snapshot was taken."""
    digests = read(snapshot.folder / FILES)
    present = mapped(hash_of, list(digests), threads=FILES_AT_ONCE)
    return [path for path, digest in zip(digests, present, strict=True) if digest != digests[path]]


def _on_disk(manifest: Manifest, folder: Path) -> Manifest:
    """Write images that are not files, such as the embedded digits, to the snapshot's folder."""
    from refract.pipeline.files import write_atomically

    def as_file(sample: Sample) -> Sample:
        if not sample.has_image or sample.data is None:
            return sample
        path = folder / "files" / sample.path
        if not path.exists():
            write_atomically(path, sample.data)
        return replace(sample, path=str(path), data=None)

    return manifest.with_samples(list(mapped(as_file, manifest.samples, threads=FILES_AT_ONCE)))


def read_snapshot(folder: Path, record: Mapping[str, Any]) -> Snapshot:
    """Return the snapshot whose `record` this is."""
    return Snapshot(
        folder,
        record["digest"],
        record["holdout"],
        record["task"],
        record["counts"],
        tuple(record["columns"]),
        record["skipped"],
        record.get("labels", {}),
    )


def inputs_digest(config: Config, snapshot: Snapshot, code: Mapping[str, str], diff: str) -> str:
    """Return the SHA-256 of all that determines a run's outcome: data, config, the files that the config names, and code.

    Excluded are paths of folders, and names of runs.
    """
    values = filled(config).to_dict()
    values.pop("plugins", None)  # `_named` has their content
    for section, keys in {
        "trainer": ("run_name", "runs_dir", "copy_to"),
        # Thresholds of the label checks refuse a run or have no effect. A run that a user accepted is not repeated without them.
        "retrain": (
            *("folder", "keep_snapshots", "notify", "webhook", "webhook_on"),
            *("relabelled_warn", "relabelled_stop", "disagreement_warn", "disagreement_stop"),
        ),
        "data": ("source", "labels"),  # the snapshot has their content
    }.items():
        values[section] = {key: value for key, value in values[section].items() if key not in keys}
    code = {key: value for key, value in code.items() if key != "dirty"}
    whole = json.dumps([snapshot.digest, snapshot.holdout, values, _named(config), code, diff], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _named(config: Config) -> dict[str, str]:
    """Return config key → SHA-256 of the file or folder that it names on this machine."""
    policy = config.augment.policy
    digest = hash_of(Path(policy)) if isinstance(policy, str) else None
    return inputs(config) | ({} if digest is None else {"augment.policy": digest})
