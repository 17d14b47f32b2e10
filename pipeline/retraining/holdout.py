"""The frozen hold-out: copies of pictures and texts that no night trains on, known by their content and checked each time."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.data.manifest import DataError, Manifest, Sample, load_manifest
from pipeline.files import write_atomically

TABLE = "holdout.csv"
CONTENT = "content_sha256"


@dataclass(frozen=True)
class HoldOut:
    """manifest: of the copies; contents: what tells each from what is trained on (`pipeline.data.check.Scan.groups`); digest: of all of
    it, the hold-out's version."""

    manifest: Manifest
    contents: frozenset[str]
    digest: str

    def samples(self, labels: Sequence[str]) -> list[Sample]:
        """Its samples with the split `test` and their labels' places in `labels`, which has them all."""
        place = [list(labels).index(label) for label in self.manifest.labels]
        return [
            replace(
                sample,
                labels=tuple(place[i] for i in sample.labels),
                split="test",
                metadata={key: value for key, value in sample.metadata.items() if key != CONTENT},
            )
            for sample in self.manifest.samples
        ]


def frozen(folder: Path, task: str) -> HoldOut | None:
    """That which is there, each file checked; None where there is none. DataError where a file is not what was frozen."""
    table = folder / TABLE
    if not table.exists():
        return None
    manifest = load_manifest(table, task)
    changed = [s.path for s in manifest.samples if s.pictured and hash_of(Path(s.path)) != Path(s.path).stem]
    if changed:
        raise DataError(
            f"{folder}: {len(changed)} pictures of the frozen hold-out are gone or have changed, as {changed[0]}. Put them back, or move "
            "the folder away, whereupon a new hold-out is drawn, of pictures that the champion may have been trained on"
        )
    contents = frozenset(sample.metadata[CONTENT] for sample in manifest.samples)
    rows = sorted(
        f"{Path(s.path).stem if s.pictured else ''} {s.text!r} {[manifest.labels[i] for i in s.labels]}"
        for s in manifest.samples
    )
    return HoldOut(manifest, contents, hashlib.sha256("\n".join(rows).encode()).hexdigest())


def freeze(folder: Path, manifest: Manifest, samples: Sequence[Sample], contents: Mapping[str, str]) -> HoldOut:
    """Copy the samples, beside those that are there, and write down what they are; contents: a sample's key → what tells it from others.
    Files are there before the table that names them, so that a kill leaves the old hold-out or the new one."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "path": _copied(sample, folder) if sample.pictured else "",
            "label": ";".join(manifest.labels[i] for i in sample.labels),
            "text": sample.text,
            CONTENT: contents[sample.key],
            **sample.metadata,
        }
        for sample in samples
    ]
    table = pd.DataFrame(rows)
    if (folder / TABLE).exists():
        before = pd.read_csv(folder / TABLE, dtype=str, keep_default_na=False)
        table = pd.concat([before, table], ignore_index=True).fillna("")
    write_atomically(folder / TABLE, table.to_csv(index=False).encode())
    made = frozen(folder, manifest.task)
    assert made is not None
    return made


def _copied(sample: Sample, folder: Path) -> str:
    """The copy's path below the folder, named by its content. DataError where the picture changes meanwhile."""
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
