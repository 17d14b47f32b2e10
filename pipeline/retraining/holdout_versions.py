"""The versions of the frozen holdout: its samples stay, and decisions in the label history correct their labels or exclude them.

`holdout.csv` has the labels as they were frozen. A version applies decisions to them: `version-DIGEST.csv` is its table. `versions.jsonl`
lists the versions that took effect, oldest first; lines are only added. Tables of earlier versions stay, and name the same files.
"""

import csv
import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.files import write_atomically
from refract.pipeline.labels.apply import listed_pairs
from refract.pipeline.retraining.holdout import Holdout, digest_of_copies, load_copies
from refract.pipeline.retraining.workspace import read, write

log = logging.getLogger(__name__)

VERSIONS = "versions.jsonl"

Names = tuple[str, ...]


@dataclass(frozen=True)
class Corrections:
    """Images of a holdout that differ between two of its versions.

    relabelled: (labels before, labels now) → images; excluded: images that only the earlier version has; kept: images whose decision does
    not apply, as no training image has its label.
    """

    relabelled: Mapping[tuple[str, str], int]
    excluded: int = 0
    kept: int = 0

    @property
    def count(self) -> int:
        return sum(self.relabelled.values()) + self.excluded

    def text(self) -> str:
        """Summarise the corrections: `3 images: 2 relabelled (cat → dog 2), 1 excluded`."""
        relabelled = sum(self.relabelled.values())
        parts = [
            f"{relabelled:,} relabelled ({listed_pairs(self.relabelled)})" if relabelled else "",
            f"{self.excluded:,} excluded" if self.excluded else "",
        ]
        listed = ", ".join(part for part in parts if part)
        return f"{self.count:,} image{'s' * (self.count != 1)}" + (f": {listed}" if listed else "")


@dataclass(frozen=True)
class Version:
    """A version that took effect. number: from 1 on; digest: SHA-256 of content and labels; decision: the last one of the label history
    that it takes in, 0 without one; corrections: the corrections of the frozen labels, in words."""

    number: int
    digest: str
    created: str
    samples: int
    decision: int
    corrections: str


def content_of_copy(sample: Sample) -> str:
    """Return the SHA-256 of the sample's image, which is the name of its copy; empty without an image."""
    return Path(sample.path).stem if sample.has_image else ""


def content_of_file(sample: Sample) -> str:
    """Return the SHA-256 of the sample's image, which is not a copy in the holdout; empty without an image. OSError."""
    return hashlib.sha256(sample.read()).hexdigest() if sample.has_image else ""


def as_in_source(added: Manifest, source: Manifest, contents: Mapping[str, str], trained: Collection[str]) -> Manifest:
    """Return the samples with the labels of the source, so that the frozen labels are those without decisions.

    added: samples of the data with decisions; source: the data without them; contents: path of an image → its SHA-256; trained: as in
    `corrected`. An image that decisions added keeps its label, and so does one whose copies in the source differ in their labels.
    """
    of_source: dict[str, set[Names]] = {}
    for sample in source.samples:
        if sample.has_image and sample.path in contents:
            of_source.setdefault(contents[sample.path], set()).add(_names(source, sample))
    rows: list[tuple[Sample, Names]] = []
    for sample in added.samples:
        now = _names(added, sample)
        before = of_source.get(contents.get(sample.path, ""), set()) if sample.has_image else set()
        rows.append((sample, next(iter(before)) if len(before) == 1 and set(now) <= set(trained) else now))
    labels = tuple(sorted({*added.labels, *(name for _, names in rows for name in names)}))
    index = {label: i for i, label in enumerate(labels)}
    samples = tuple(replace(sample, labels=tuple(index[name] for name in names)) for sample, names in rows)
    return replace(added, samples=samples, labels=labels)


def corrected(
    decisions: str | None,
    frozen: Holdout,
    trained: Collection[str],
    content_of: Callable[[Sample], str] = content_of_copy,
) -> tuple[Holdout, Corrections]:
    """Apply the decisions of a label history to the frozen samples, by the SHA-256 of their images.

    decisions: `data.labels`; trained: the labels of training images. A decision for another label does not apply: no model could predict
    it. content_of: returns that SHA-256. Raises as `apply_labels` for a database that cannot be used.
    """
    effects = _effects(decisions)
    manifest, multilabel = frozen.manifest, frozen.manifest.task == "multilabel"
    names: dict[str, Names] = {}
    relabelled: Counter[tuple[str, str]] = Counter()
    excluded = inapplicable = 0
    for sample in manifest.samples:
        now = before = _names(manifest, sample)
        included, labels = effects.get(content_of(sample), (True, before))
        if not included:
            excluded += 1
            continue
        if set(labels) != set(before):
            if set(labels) <= set(trained) and (multilabel or len(labels) == 1):
                now = labels
                relabelled[";".join(before), ";".join(now)] += 1
            else:
                inapplicable += 1
        names[sample.key] = now
    if not relabelled and not excluded:
        return frozen, Corrections({}, 0, inapplicable)
    labels_now = tuple(sorted({name for row in names.values() for name in row}))
    index = {label: i for i, label in enumerate(labels_now)}
    samples = [
        replace(sample, labels=tuple(index[name] for name in names[sample.key]))
        for sample in manifest.samples if sample.key in names
    ]  # fmt: skip
    version = replace(manifest, samples=tuple(samples), labels=labels_now)
    return Holdout(version, digest_of_copies(version)), Corrections(relabelled, excluded, inapplicable)


def difference(before: Manifest, now: Manifest) -> Corrections:
    """Compare two versions. Samples that only the later one has do not count: those of a new class are no correction."""
    old, new = (
        {(content_of_copy(s), s.text): ";".join(sorted(_names(one, s))) for s in one.samples} for one in (before, now)
    )
    relabelled = Counter((label, new[key]) for key, label in old.items() if key in new and new[key] != label)
    return Corrections(relabelled, sum(key not in new for key in old))


def propose(folder: Path, version: Holdout, frozen: Holdout, decisions: str | None, corrections: Corrections) -> None:
    """Write a version's table and its record; `record_version` lists it once the data of the run are accepted.

    decisions: `data.labels`.
    """
    from refract.pipeline.labels.address import split_address

    name = _name(version.digest)
    rows = [
        {
            "path": os.path.relpath(sample.path, folder) if sample.has_image else "",
            "label": ";".join(_names(version.manifest, sample)),
            "text": sample.text,
            **sample.metadata,
        }
        for sample in version.manifest.samples
    ]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]) if rows else ["path", "label"], quoting=csv.QUOTE_ALL, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / f"{name}.csv", table.getvalue().encode("utf-8", "surrogateescape"))
    record = {
        "digest": version.digest,
        "frozen": frozen.digest,
        "samples": len(rows),
        "decision": split_address(decisions)[1] or 0,
        "corrections": corrections.text() if corrections.count else "",
    }
    write(folder / f"{name}.json", record)


def frozen_digest(folder: Path, digest: str) -> str:
    """Return the digest of the frozen labels below a version; that of a version of an earlier Refract is its own."""
    path = folder / f"{_name(digest)}.json"
    return str(read(path)["frozen"]) if path.exists() else digest


def record_version(folder: Path, digest: str) -> None:
    """Add a version to the list, unless it is the last one."""
    known, path = versions(folder), folder / f"{_name(digest)}.json"
    if not path.exists() or (known and known[-1].digest == digest):
        return
    record = {key: value for key, value in read(path).items() if key != "frozen"}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"number": len(known) + 1, "created": now, **record}, ensure_ascii=False) + "\n"
    before = (folder / VERSIONS).read_bytes() if known else b""
    write_atomically(folder / VERSIONS, before + line.encode())


def versions(folder: Path) -> list[Version]:
    """Return the versions that took effect, oldest first. ConfigError for a damaged list."""
    from refract.pipeline.config.config import ConfigError

    try:
        lines = (folder / VERSIONS).read_text("utf-8").splitlines()
        return [Version(**json.loads(line)) for line in lines]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{folder / VERSIONS}: cannot be read ({error}); restore it, or move it away") from error


def load_version(folder: Path, digest: str, task: str) -> Manifest | None:
    """Load the samples of a version; None if its table is missing or has changed. DataError if an image is gone or has changed."""
    path = folder / f"{_name(digest)}.csv"
    if not path.exists():
        return None
    version = load_copies(path, task)
    if version.digest != digest:
        log.warning(
            "holdout: %s has changed: it is not the table of version %s, which is not compared", path, digest[:16]
        )
        return None
    return version.manifest


def _effects(decisions: str | None) -> dict[str, tuple[bool, Names]]:
    """Return SHA-256 of an image → (whether it is in the data, its labels), by the decisions of `data.labels`."""
    if decisions is None:
        return {}
    from refract.pipeline.labels.address import opened, split_address

    address, number = split_address(decisions)
    assert address is not None
    return {content: one.applied.effect for content, one in opened(address).state(until=number).images.items()}


def _names(manifest: Manifest, sample: Sample) -> Names:
    return tuple(manifest.labels[i] for i in sample.labels)


def _name(digest: str) -> str:
    return f"version-{digest[:16]}"
