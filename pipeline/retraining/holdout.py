"""The frozen hold-out: copies of images and texts that no night trains on, checked each time."""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refract.pipeline.config.config import Config
from refract.pipeline.data.manifest import DataError, Manifest, Sample, load_manifest
from refract.pipeline.data.validation import drop_bad, drop_contradictory, scan
from refract.pipeline.files import write_atomically
from refract.pipeline.retraining.workspace import read, write
from refract.pipeline.training.build import reads

TABLE, SOURCE = "holdout.csv", "source.json"
NEXT, NEXT_RECORD = "next.csv", "next.json"


@dataclass(frozen=True)
class Holdout:
    """manifest: of the copies; digest: of all of it, the hold-out's version."""

    manifest: Manifest
    digest: str


def held_out(manifest: Manifest, labels: Sequence[str]) -> list[Sample]:
    """Its samples with the split `test` and their labels' places in `labels`, which has them all."""
    return [replace(sample, split="test") for sample in renamed(manifest, labels)]


def renamed(manifest: Manifest, labels: Sequence[str]) -> list[Sample]:
    """Its samples with their labels' places in `labels`, which has them all."""
    place = [list(labels).index(label) for label in manifest.labels]
    return [replace(sample, labels=tuple(place[i] for i in sample.labels)) for sample in manifest.samples]


def frozen(folder: Path, task: str) -> Holdout | None:
    """That which is there, each file checked; None where there is none. DataError where a file is not what was frozen."""
    return _checked(folder / TABLE, task) if (folder / TABLE).exists() else None


def _checked(table: Path, task: str) -> Holdout:
    manifest, folder = load_manifest(table, task, to_train=False), table.parent
    changed = [s.path for s in manifest.samples if s.has_image and hash_of(Path(s.path)) != Path(s.path).stem]
    if changed:
        raise DataError(
            f"{folder}: {len(changed)} images of the frozen hold-out are gone or have changed, as {changed[0]}. Put them back, or move "
            "the folder away, whereupon a new hold-out is drawn, of images that the champion may have been trained on"
        )
    return Holdout(manifest, _digest(manifest, [Path(s.path).stem for s in manifest.samples]))


def named(config: Config, folder: Path, task: str, kept: Holdout | None) -> Manifest | None:
    """What `gate.holdout` names, to be frozen; None where it is `kept` already, or names nothing. DataError where another one is kept."""
    source = config.gate.holdout
    if source is None:
        return None
    record = read(folder / SOURCE) if (folder / SOURCE).exists() else {}
    if kept is not None and record.get("source") == source and not Path(source).exists():
        return None  # it was copied
    own = load_manifest(source, task, to_train=False)
    if kept is None:
        seen = scan(own.samples, reads=reads(config))
        return drop_contradictory(drop_bad(own, seen, "error"), seen, "error")
    if record.get("digest") != _digest_of(own):
        raise DataError(
            f"gate.holdout: {source} is not what {folder} was made of ({record.get('source', 'a test split')}), and runs are compared on "
            "that. Put gate.holdout back, or move the folder away: the next night freezes what gate.holdout names"
        )
    return None


def freeze(
    folder: Path, labels: Sequence[str], samples: Sequence[Sample], task: str, own: Manifest | None = None
) -> Holdout:
    """Copy the samples, beside those that are there, and write down what they are. own: what `gate.holdout` names, if it is among them.

    It is the hold-out once `accept` has made it so: classes of a night that is refused must not stay in it.
    """
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "path": _copied(sample, folder) if sample.has_image else "",
            "label": ";".join(labels[i] for i in sample.labels),
            "text": sample.text,
            **sample.metadata,
        }
        for sample in samples
    ]
    table = pd.DataFrame(rows)
    source: dict[str, str] | None = None
    if (folder / TABLE).exists():
        before = pd.read_csv(folder / TABLE, dtype=str, keep_default_na=False)
        table = pd.concat([before, table], ignore_index=True).fillna("")
        source = read(folder / SOURCE) if (folder / SOURCE).exists() else None
    if own is not None:
        source = {"source": own.source, "digest": _digest_of(own)}
    (folder / NEXT_RECORD).unlink(missing_ok=True)  # of another night
    # All quoted: as in `write_splits`.
    write_atomically(folder / NEXT, table.to_csv(index=False, quoting=csv.QUOTE_ALL).encode())
    made = _checked(folder / NEXT, task)
    write(folder / NEXT_RECORD, {"digest": made.digest, "source": source})
    return made


def accept(folder: Path, digest: str) -> None:
    """What `freeze` prepared is the hold-out from now on, if it is the version `digest`. A kill leaves the old one or the new one."""
    if not (folder / NEXT).exists() or not (folder / NEXT_RECORD).exists():
        return
    record = read(folder / NEXT_RECORD)
    if record["digest"] != digest:
        return
    if record["source"] is None:
        (folder / SOURCE).unlink(missing_ok=True)
    else:
        write(folder / SOURCE, record["source"])
    (folder / NEXT).replace(folder / TABLE)
    (folder / NEXT_RECORD).unlink()


def _digest_of(manifest: Manifest) -> str:
    return _digest(manifest, [hashlib.sha256(s.read()).hexdigest() if s.has_image else "" for s in manifest.samples])


def _digest(manifest: Manifest, images: Sequence[str]) -> str:
    """SHA-256 over content and labels. images: each one's."""
    rows = sorted(
        f"{image if s.has_image else ''} {s.text!r} {[manifest.labels[i] for i in s.labels]}"
        for s, image in zip(manifest.samples, images, strict=True)
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _copied(sample: Sample, folder: Path) -> str:
    """The copy's path below the folder, named by its content. DataError where the image changes meanwhile."""
    data = sample.read()
    digest = hashlib.sha256(data).hexdigest()
    name = f"files/{digest[:2]}/{digest}{Path(sample.path).suffix.lower()}"
    if hash_of(folder / name) != digest:
        write_atomically(folder / name, data)
    return name


def hash_of(path: Path) -> str | None:
    """SHA-256 of a file, None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
