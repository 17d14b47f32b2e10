"""The frozen holdout: copies of images and texts that no run trains on. Every run verifies them.

This module does not know corrections of their labels: `holdout_versions.py` applies them.
"""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from refract.cores import mapped
from refract.pipeline.data import storage
from refract.pipeline.data.manifest import DataError, Manifest, Sample, load_manifest
from refract.pipeline.data.scan import scan
from refract.pipeline.data.validation import drop_bad, drop_contradictory
from refract.pipeline.files import write_atomically
from refract.pipeline.retraining.workspace import read, write
from refract.progress import tracked

TABLE, SOURCE = "holdout.csv", "source.json"
NEXT, NEXT_RECORD = "next.csv", "next.json"

FILES_AT_ONCE = 32
"""Threads that read and write files. Each waits until the disk has stored its file, and disks store several at once: 2,000 files took
0.85 s with 16 threads and 7 s with one."""


@dataclass(frozen=True)
class Holdout:
    """manifest: the copies; digest: SHA-256 of content and labels, the holdout's version."""

    manifest: Manifest
    digest: str


def as_test_samples(manifest: Manifest, labels: Sequence[str]) -> list[Sample]:
    """Return the samples with the split `test`, and with label indices into `labels`, which contains all of the manifest's labels."""
    return [replace(sample, split="test") for sample in renamed(manifest, labels)]


def renamed(manifest: Manifest, labels: Sequence[str]) -> list[Sample]:
    """Return the samples with label indices into `labels`, which contains all of the manifest's labels."""
    index_of = {label: index for index, label in enumerate(labels)}
    index = [index_of[label] for label in manifest.labels]
    return [replace(sample, labels=tuple(index[i] for i in sample.labels)) for sample in manifest.samples]


def frozen(folder: Path, task: str) -> Holdout | None:
    """Load the frozen holdout and verify each file; None if none is frozen. DataError if a file is gone or has changed."""
    return load_copies(folder / TABLE, task) if (folder / TABLE).exists() else None


def load_copies(table: Path, task: str) -> Holdout:
    """Load a table of the holdout's folder and verify each file. DataError if a file is gone or has changed."""
    manifest, folder = load_manifest(table, task, to_train=False), table.parent
    paths = [Path(sample.path) for sample in manifest.samples if sample.has_image]
    hashes = mapped(hash_of, paths, threads=FILES_AT_ONCE)
    changed = [str(path) for path, digest in zip(paths, hashes, strict=True) if digest != path.stem]
    if changed:
        raise DataError(
            f"{folder}: {len(changed)} images of the frozen holdout are gone or have changed, such as {changed[0]}. Put them back, or "
            "move the folder away; the next run then draws a new holdout, perhaps of images that the champion was trained on"
        )
    return Holdout(manifest, digest_of_copies(manifest))


def digest_of_copies(manifest: Manifest) -> str:
    """Return the version of the samples, whose images are copies in the holdout's folder."""
    return _digest(manifest, [Path(s.path).stem for s in manifest.samples])


def named(
    source: str | None, folder: Path, task: str, current: Holdout | None, reads: frozenset[str]
) -> Manifest | None:
    """Load what `gate.holdout` names, to be frozen; None if it is unset or frozen already. DataError if other data are frozen.

    source: `gate.holdout`; current: the frozen holdout, None before the first one; reads: `Config.reads`.
    """
    if source is None:
        return None
    record = read(folder / SOURCE) if (folder / SOURCE).exists() else {}
    if current is not None and record.get("source") == source and not Path(source).exists():
        return None  # its copy is the holdout
    manifest = load_manifest(source, task, to_train=False)
    if current is None:
        seen = scan(manifest.samples, reads=reads)
        return drop_contradictory(drop_bad(manifest, seen, "error"), seen, "error")
    if record.get("digest") != _digest_of(manifest):
        raise DataError(
            f"gate.holdout: {source} is not the source of the frozen {folder} ({record.get('source', 'a test split')}). "
            "Restore gate.holdout, or move the folder away; the next run then freezes what gate.holdout names"
        )
    return None


def freeze(
    folder: Path, labels: Sequence[str], samples: Sequence[Sample], task: str, configured: Manifest | None = None
) -> Holdout:
    """Copy the samples next to those of the present holdout, and write the next version's table.

    configured: what `gate.holdout` names, if the samples come from it. The next version takes effect by `accept`, so that the
    holdout gets no classes from a refused run.
    """
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    copies = mapped(partial(_copied, folder=folder), samples, threads=FILES_AT_ONCE)
    rows = [
        {"path": copy, "label": ";".join(labels[i] for i in sample.labels), "text": sample.text, **sample.metadata}
        for sample, copy in zip(samples, tracked(copies, "copying the holdout", len(samples)), strict=True)
    ]
    table = pd.DataFrame(rows)
    source: dict[str, str] | None = None
    if (folder / TABLE).exists():
        before = pd.read_csv(folder / TABLE, dtype=str, keep_default_na=False)
        table = pd.concat([before, table], ignore_index=True).fillna("")
        source = read(folder / SOURCE) if (folder / SOURCE).exists() else None
    if configured is not None:
        source = {"source": configured.source, "digest": _digest_of(configured)}
    (folder / NEXT_RECORD).unlink(missing_ok=True)  # of a run that was refused or killed
    # Quoted as `write_splits` does.
    write_atomically(folder / NEXT, table.to_csv(index=False, quoting=csv.QUOTE_ALL).encode())
    holdout = load_copies(folder / NEXT, task)
    write(folder / NEXT_RECORD, {"digest": holdout.digest, "source": source})
    return holdout


def accept(folder: Path, digest: str) -> None:
    """Put the samples that `freeze` wrote into effect if their digest is `digest`. A kill leaves the old samples or the new ones."""
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
    """Return the SHA-256 of content and labels. images: the SHA-256 of each sample's image."""
    rows = sorted(
        f"{image if s.has_image else ''} {s.text!r} {[manifest.labels[i] for i in s.labels]}"
        for s, image in zip(manifest.samples, images, strict=True)
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _copied(sample: Sample, folder: Path) -> str:
    """Copy the image to a file named by its SHA-256, and return its path relative to the folder; "" without an image. OSError."""
    if not sample.has_image:
        return ""
    data = sample.read()
    digest = hashlib.sha256(data).hexdigest()
    name = f"files/{digest[:2]}/{digest}{Path(sample.path).suffix.lower()}"
    if hash_of(folder / name) != digest:
        write_atomically(folder / name, data)
    return name


def hash_of(path: str | Path) -> str | None:
    """Return the SHA-256 of a file; None if it cannot be read."""
    try:
        return storage.sha256(str(path))
    except OSError:
        return None
