"""The data of a night, written down by content, so that they can be known and trained on again."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refract.pipeline.config.config import Config
from refract.pipeline.config.defaults import filled
from refract.pipeline.data.manifest import DataError, Manifest, Sample, load_manifest
from refract.pipeline.data.sources.folders import skipped_lines
from refract.pipeline.data.splits import draw_splits, write_splits
from refract.pipeline.data.validation import Scan, check_classes, drop_bad, drop_contradictory, drop_shared, scan
from refract.pipeline.retraining import holdout
from refract.pipeline.retraining.champion_data import ChampionData
from refract.pipeline.retraining.exact_duplicates import contents, without_copies
from refract.pipeline.retraining.holdout import Holdout, freeze, frozen, hash_of, held_out, named, renamed
from refract.pipeline.retraining.workspace import Workspace, read, write
from refract.pipeline.training.build import check_inputs, reads
from refract.pipeline.training.provenance import inputs

log = logging.getLogger(__name__)

TABLE, RECORD, FILES, CONTENTS = "manifest.csv", "snapshot.json", "files.json", "contents.json"
PROPOSED = "proposed"
"""In a snapshot's folder as long as no night has been let train on it."""


@dataclass(frozen=True)
class Snapshot:
    """folder: with `manifest.csv`, which trains, `files.json`, each file's SHA-256, `contents.json`, what every sample is known by, and
    `snapshot.json`, this record.

    digest: of content, labels and splits; holdout: its version; counts: split → label → samples; columns: the metadata's; left_out:
    unreadable images.
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


def take(config: Config, place: Workspace, champion: ChampionData | None = None) -> Snapshot:
    """Look at every image, keep the hold-out apart, draw what validates, and write it all down. DataError for data that cannot be used.

    The hold-out: `gate.holdout`, or the test split of the first night (the data's own, else drawn); of classes that it lacks, images that
    no night has trained on are added. Its copies in the data are not trained on; nor are further images of the data's own test split.

    champion: what the first hold-out has to respect. Its test split is then held out, and nothing that it was trained on.
    """
    manifest, found = _looked_at(config)
    kind = "multilabel" if manifest.task == "multilabel" else "multiclass"
    kept = frozen(place.holdout, kind)
    own = named(config, place.holdout, kind, kept)
    apart = [one for one in (kept.manifest if kept else None, own) if one is not None]
    labels = tuple(sorted({*manifest.labels, *(label for one in apart for label in one.labels)}))
    task = "multiclass" if manifest.task == "binary" and len(labels) > 2 else manifest.task
    data = replace(manifest, samples=tuple(renamed(manifest, labels)), labels=labels, task=task)
    held = [sample for one in apart for sample in held_out(one, labels)]
    added = held_out(own, labels) if own else []
    added += _lacking(config, place, data, held, found, champion)
    held = [*(held_out(kept.manifest, labels) if kept else []), *added]
    pool = without_copies([s for s in data.samples if s.split != "test"], held, found, reads(config))
    whole = draw_splits(data.with_samples([*pool, *held]), found.groups, **_shares(config), seed=config.trainer.seed)
    trained = whole.with_samples([sample for sample in whole.samples if sample.split != "test"])
    trained = drop_shared(trained, found, config.data.on_bad_file)
    check_classes(trained.with_samples([*trained.samples, *held]))
    if kept is None or added:
        kept = freeze(place.holdout, labels, added, kind, own)
    return _written(place, trained.with_samples([*trained.samples, *held_out(kept.manifest, labels)]), kept, found)


def _looked_at(config: Config) -> tuple[Manifest, Scan]:
    manifest = load_manifest(config.data.source, config.data.task)
    for line in (*manifest.notes, *skipped_lines(manifest.skipped)):
        log.warning("data: %s", line)
    check_inputs(config, manifest)
    found = scan(manifest.samples, reads=reads(config))
    manifest = drop_bad(manifest, found, config.data.on_bad_file)
    return drop_contradictory(manifest, found, config.data.on_bad_file), found


def _lacking(
    config: Config,
    place: Workspace,
    data: Manifest,
    held: Sequence[Sample],
    found: Scan,
    champion: ChampionData | None,
) -> list[Sample]:
    """What the hold-out lacks: where there is none, the data's own test split; then images of each class that it does not have."""
    lacking = set(range(len(data.labels))) - _carried(held)
    if held and not lacking:
        return []
    known: frozenset[str] = _trained_before(place) if held else champion.trained if champion else frozenset()
    asked = [sample for sample in data.samples if not held or lacking & set(sample.labels)]
    seen = {sample.key for sample in asked if known and known & contents(sample)}
    fresh = without_copies([sample for sample in asked if sample.key not in seen], held, found, reads(config))
    drawing = not held and "test" not in data.splits()
    if drawing and champion:
        fresh = [replace(s, split="test") if found.groups[s.key] in champion.tested else s for s in fresh]
    own = [sample for sample in fresh if sample.split == "test"]
    lacking -= _carried(own)
    rest = [s for s in fresh if s.split != "test" and (drawing or lacking & set(s.labels))]
    drawn = data.with_samples([replace(sample, split="") for sample in rest])
    drawn = draw_splits(drawn, found.groups, **_shares(config), seed=config.trainer.seed)
    added = [*own, *drawn.of("test")]
    seldom = lacking - _carried(added)
    learned = _carried(sample for sample in asked if sample.key in seen)
    refused = seldom - learned if held and known and data.task != "multilabel" else set()
    if refused or not (held or added) or (data.task != "multilabel" and len(_carried([*held, *added])) < 2):
        if champion:
            log.warning("data: the champion was trained on too many images to hold out others; the gate counts them")
            return _lacking(config, place, data, held, found, None)
        what = ", ".join(data.labels[i] for i in sorted(refused or seldom or lacking))
        raise DataError(
            f"{data.source}: too few images of {what} to keep a hold-out apart; add some, or raise data.test_fraction"
        )
    if seldom:
        log.warning(
            "data: the hold-out has no image of %s: there are too few that no night has trained on; add some",
            ", ".join(data.labels[i] for i in sorted(seldom)),
        )
    return added


def _carried(samples: Iterable[Sample]) -> set[int]:
    return {label for sample in samples for label in sample.labels}


def _trained_before(place: Workspace) -> frozenset[str]:
    """What tells the samples of all earlier runs that were let train, as `contents`."""
    folders = [folder for folder in (place.root / "snapshots").glob("*") if not (folder / PROPOSED).exists()]
    runs = [known_contents(folder) for folder in folders]
    return frozenset[str]().union(*(night for night in runs if night is not None))


def accept(place: Workspace, snapshot: Snapshot) -> None:
    """The night is let train: its hold-out is that of the runs to come, and what it trains on is held out no more."""
    holdout.accept(place.holdout, snapshot.holdout)
    (snapshot.folder / PROPOSED).unlink(missing_ok=True)


def known_contents(folder: Path) -> frozenset[str] | None:
    """What a snapshot trains and validates on, as `contents`; None where it is not there."""
    for name in (CONTENTS, FILES):  # files alone: of an older version
        if (folder / name).exists():
            return frozenset(read(folder / name).values() if name == FILES else read(folder / name)["contents"])
    return None


def _shares(config: Config) -> dict[str, float]:
    return {"val_fraction": config.data.val_fraction, "test_fraction": config.data.test_fraction}


def _written(place: Workspace, whole: Manifest, kept: Holdout, found: Scan) -> Snapshot:
    """On the disk, whatever is there: the same content may lie elsewhere than on the night before. The record comes last."""
    trained = [sample for sample in whole.samples if sample.split != "test"]
    lines = sorted(f"{found.hashes[s.key]} {[whole.labels[i] for i in s.labels]} {s.split}" for s in trained)
    digest = hashlib.sha256("\n".join([*lines, kept.digest]).encode()).hexdigest()
    folder = place.snapshot(digest)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RECORD).exists():
        (folder / PROPOSED).touch()
    columns = tuple(sorted({name for sample in whole.samples for name in sample.metadata}))
    counts = {split: whole.counts(split) for split in whole.splits()}
    made = Snapshot(folder, digest, kept.digest, whole.task, counts, columns, len(found.bad))
    write(folder / CONTENTS, {"contents": sorted({found.groups[sample.key] for sample in trained})})
    whole = _on_disk(whole, folder)
    _write_table(whole, folder / TABLE)
    files = [sample for sample in whole.samples if sample.split != "test" and sample.has_image]
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
    """Images that are no files, as the embedded digits, become some."""
    from refract.pipeline.files import write_atomically

    samples = []
    for sample in manifest.samples:
        if sample.has_image and sample.data is not None:
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
    values = filled(config).to_dict()
    for section, keys in {
        "trainer": ("run_name", "runs_dir"),
        # The thresholds of labels end a run or do nothing: one that was accepted on purpose is not repeated without them.
        "retrain": ("folder", "tell", "relabelled_warn", "relabelled_stop", "disagreement_warn", "disagreement_stop"),
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
