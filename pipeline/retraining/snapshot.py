"""The data of a night, written down by content, so that they can be known and trained on again."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.check import Scan, check_classes, drop_bad, drop_contradictory, scan
from pipeline.data.manifest import DataError, Manifest, Sample, load_manifest
from pipeline.data.splits import draw_splits, write_splits
from pipeline.provenance import inputs
from pipeline.recipe import check_inputs, reads
from pipeline.retraining.holdout import HoldOut, freeze, frozen, hash_of
from pipeline.retraining.place import Place, read, write

TABLE, RECORD, FILES = "manifest.csv", "snapshot.json", "files.json"


@dataclass(frozen=True)
class Snapshot:
    """folder: with `manifest.csv`, which trains, `files.json`, each file's SHA-256, and `snapshot.json`, this record.

    digest: of content, labels and splits; holdout: its version; counts: split → label → samples; columns: the metadata's; left_out:
    unreadable pictures.
    """

    folder: Path
    digest: str
    holdout: str
    task: str
    counts: dict[str, dict[str, int]]
    columns: tuple[str, ...]
    left_out: int

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
            "left_out": self.left_out,
        }


def take(config: Config, place: Place) -> Snapshot:
    """Look at every picture, keep the hold-out apart, draw what validates, and write it all down. DataError for data that cannot be used.

    The hold-out: `gate.holdout`, or the test split of the first night (the data's own, else drawn); of classes that it lacks, pictures are
    drawn and added. Its copies in the data, under whatever name, are not trained on; nor are further pictures of the data's own test split.
    """
    manifest = load_manifest(config.data.source, config.data.task)
    check_inputs(config, manifest)
    found = scan(manifest.samples, reads=reads(config))
    manifest = drop_bad(manifest, found, config.data.on_bad_file)
    manifest = drop_contradictory(manifest, found, config.data.on_bad_file)
    kept = _kept_apart(config, place, manifest, found.groups)
    labels = tuple(sorted({*manifest.labels, *kept.manifest.labels}))
    pool = [
        sample
        for sample in _renamed(manifest, labels)
        if sample.split != "test" and found.groups[sample.key] not in kept.contents
    ]
    task = "multiclass" if manifest.task == "binary" and len(labels) > 2 else manifest.task
    whole = replace(manifest, samples=(*pool, *kept.samples(labels)), labels=labels, task=task)
    whole = draw_splits(whole, found.groups, **_shares(config), seed=config.trainer.seed)
    check_classes(whole)
    return _written(place, whole, kept, found)


def _kept_apart(config: Config, place: Place, manifest: Manifest, groups: Mapping[str, str]) -> HoldOut:
    """The hold-out, made or completed where need be."""
    kind = "multilabel" if manifest.task == "multilabel" else "multiclass"
    kept = frozen(place.holdout, kind)
    if config.gate.holdout is not None:
        if kept is None:
            own = load_manifest(config.gate.holdout, kind)
            seen = scan(own.samples, reads=reads(config))
            own = drop_contradictory(drop_bad(own, seen, "error"), seen, "error")
            kept = freeze(place.holdout, own, own.samples, seen.groups)
        return kept
    lacking = set(manifest.labels) - set(kept.manifest.labels if kept else ())
    if kept is not None and not lacking:
        return kept
    drawn = manifest
    if kept is not None or not manifest.of("test"):
        # Of what no night has trained on: the first night's data, or classes that are new.
        fresh = {i for i, label in enumerate(manifest.labels) if label in lacking}
        known = kept.contents if kept else frozenset()
        new = [s for s in manifest.samples if set(s.labels) <= fresh and groups[s.key] not in known]
        drawn = manifest.with_samples([replace(s, split="") for s in new])
        drawn = draw_splits(drawn, groups, **_shares(config), seed=config.trainer.seed)
    tests = drawn.of("test")
    if not tests:
        what = ", ".join(sorted(lacking))
        raise DataError(
            f"{manifest.source}: too few pictures of {what} to keep a hold-out apart; add some, or raise data.test_share"
        )
    return freeze(place.holdout, manifest, tests, groups)


def _shares(config: Config) -> dict[str, float]:
    return {"val_share": config.data.val_share, "test_share": config.data.test_share}


def _renamed(manifest: Manifest, labels: tuple[str, ...]) -> list[Sample]:
    place = [labels.index(label) for label in manifest.labels]
    return [replace(sample, labels=tuple(place[i] for i in sample.labels)) for sample in manifest.samples]


def _written(place: Place, whole: Manifest, kept: HoldOut, found: Scan) -> Snapshot:
    """On the disk, whatever is there: the same content may lie elsewhere than on the night before. The record comes last."""
    trained = [sample for sample in whole.samples if sample.split != "test"]
    lines = sorted(f"{found.hashes[s.key]} {[whole.labels[i] for i in s.labels]} {s.split}" for s in trained)
    digest = hashlib.sha256("\n".join([*lines, kept.digest]).encode()).hexdigest()
    folder = place.snapshot(digest)
    folder.mkdir(parents=True, exist_ok=True)
    columns = tuple(sorted({name for sample in whole.samples for name in sample.metadata}))
    counts = {split: whole.counts(split) for split in whole.splits()}
    made = Snapshot(folder, digest, kept.digest, whole.task, counts, columns, len(found.bad))
    _write_table(_on_disk(whole, folder), folder / TABLE)
    files = [sample for sample in trained if sample.pictured and sample.data is None]
    write(folder / FILES, {str(Path(s.path).resolve()): hash_of(Path(s.path)) for s in files})
    write(folder / RECORD, made.record())
    return made


def _write_table(manifest: Manifest, path: Path) -> None:
    """As `write_splits`, but that a night which reads the table meanwhile finds the old one or the new one, whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as beside:
        write_splits(manifest, Path(beside) / TABLE)
        (Path(beside) / TABLE).replace(path)


def changed(snapshot: Snapshot) -> list[str]:
    """Files that are not what they were when the snapshot was taken, or are gone."""
    return [path for path, digest in read(snapshot.folder / FILES).items() if hash_of(Path(path)) != digest]


def _on_disk(manifest: Manifest, folder: Path) -> Manifest:
    """Pictures that are no files, as the embedded digits, become some."""
    from pipeline.files import write_atomically

    samples = []
    for sample in manifest.samples:
        if sample.pictured and sample.data is not None:
            path = folder / "files" / sample.path
            if not path.exists():
                write_atomically(path, sample.data)
            sample = replace(sample, path=str(path), data=None)
        samples.append(sample)
    return manifest.with_samples(samples)


def read_snapshot(folder: Path, record: Mapping[str, Any]) -> Snapshot:
    """What `record` wrote down."""
    return Snapshot(
        folder,
        record["digest"],
        record["holdout"],
        record["task"],
        record["counts"],
        tuple(record["columns"]),
        record["left_out"],
    )


def inputs_digest(config: Config, snapshot: Snapshot, code: Mapping[str, str], diff: str) -> str:
    """What a night's outcome follows from: data, config, the files that it names, and code. The folders' places and the night's own names
    count for nothing."""
    values = config.to_dict()
    for section, keys in {
        "trainer": ("run_name", "runs_dir"),
        "retrain": ("folder", "tell"),
        "data": ("source",),
    }.items():
        values[section] = {key: value for key, value in values[section].items() if key not in keys}
    code = {key: value for key, value in code.items() if key != "dirty"}
    whole = json.dumps([snapshot.digest, snapshot.holdout, values, _named(config), code, diff], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _named(config: Config) -> dict[str, str]:
    """config key → SHA-256 of what it names here."""
    policy = config.augment.policy
    own = {"augment.policy": hash_of(Path(policy)) if isinstance(policy, str) else None}
    return inputs(config) | {key: digest for key, digest in own.items() if digest is not None}
