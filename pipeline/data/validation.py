"""Check all samples before training: unreadable images, copies in two splits, contradictory labels, classes without training images."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from refract.augment.decoding.decode import decode_part
from refract.cores import mapped
from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data.manifest import SPLITS, DataError, Manifest, Sample
from refract.pipeline.data.near_duplicates import difference_hash
from refract.pipeline.data.sources.folders import skipped_lines
from refract.progress import tracked

SHOWN = 20
"""Entries that an error lists."""


@dataclass(frozen=True)
class Scan:
    """The results of `scan`.

    hashes: sample key → SHA-256 of the inputs that the network reads, for each readable sample; groups: sample key → SHA-256 of the image,
    or of the text of a sample without an image; difference_hashes: path → `difference_hash` of the image; bad: path of an unreadable
    image → reason; remarks: path → remark on a decoded image, such as a repair; images: path → SHA-256 of the image's bytes.
    """

    hashes: dict[str, str]
    groups: dict[str, str]
    difference_hashes: dict[str, bytes]
    bad: dict[str, str]
    remarks: dict[str, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)

    def joined(self, other: "Scan", keys: Iterable[str]) -> "Scan":
        """Return the scan with the results of another one for the samples with these keys, which have an image and no text."""
        added = list(keys)
        return Scan(
            self.hashes | {key: other.hashes[key] for key in added},
            self.groups | {key: other.groups[key] for key in added},
            self.difference_hashes | {key: other.difference_hashes[key] for key in added},
            self.bad,
            self.remarks | {key: other.remarks[key] for key in added if key in other.remarks},
            self.images | {key: other.images[key] for key in added},
        )

    def content(self, manifest: Manifest) -> str:
        """Return the SHA-256 over the content and labels of all samples, independent of the splits."""
        lines = sorted(f"{self.hashes[s.key]} {[manifest.labels[i] for i in s.labels]}" for s in manifest.samples)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def fingerprint(self, manifest: Manifest) -> str:
        """Return the SHA-256 over the content, labels and splits of all samples, independent of paths and order."""
        lines = sorted(
            f"{self.hashes[s.key]} {[manifest.labels[i] for i in s.labels]} {s.split}" for s in manifest.samples
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


IMAGES = frozenset({"images"})


def scan(samples: Sequence[Sample], *, reads: frozenset[str] = IMAGES) -> Scan:
    """Hash and decode every image on all cores (decoding releases the GIL).

    reads: the network's inputs: `images`, `texts`, or both. The hashes ignore inputs that the network does not read.
    """
    hashes, groups, difference_hashes, bad, remarks, images = {}, {}, {}, {}, {}, {}
    results = tracked(mapped(_scan_one, samples), "checking samples", len(samples), unit="samples")
    for sample, (digest, image_hash, problem, remark) in zip(samples, results, strict=True):
        if problem:
            bad[sample.path] = problem
            continue
        difference_hashes[sample.path] = image_hash
        if remark:
            remarks[sample.path] = remark
        if sample.has_image:
            images[sample.path] = digest
        text = hashlib.sha256(trimmed(sample.text).encode("utf-8", "replace")).hexdigest()
        image_digest = digest if "images" in reads and sample.has_image else ""
        groups[sample.key] = image_digest or text
        both = f"{image_digest}{text}".encode()
        hashes[sample.key] = image_digest if "texts" not in reads else hashlib.sha256(both).hexdigest()
    return Scan(hashes, groups, difference_hashes, bad, remarks, images)


def drop_bad(manifest: Manifest, scanned: Scan, on_bad_file: str) -> Manifest:
    """Return the manifest without unreadable images. DataError lists them if `on_bad_file` is `error`."""
    if scanned.bad and on_bad_file == "error":
        raise DataError(
            f"{manifest.source}: {len(scanned.bad)} of {len(manifest.samples)} images cannot be read:\n"
            + _listed(f"{path}: {reason}" for path, reason in scanned.bad.items())
            + "\nRepair or remove them, or skip them with --data.on_bad_file skip."
        )
    return manifest.with_samples([sample for sample in manifest.samples if sample.path not in scanned.bad])


def drop_shared(manifest: Manifest, scanned: Scan, on_bad_file: str) -> Manifest:
    """Return the manifest with each image (by content) in one split only.

    Of copies in several splits, those of `test` remain, else those of `val`. DataError lists the images if `on_bad_file` is `error`.
    """
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    for sample in manifest.samples:
        splits[scanned.groups[sample.key]].setdefault(sample.split, sample.path)
    shared = {digest: where for digest, where in splits.items() if len(where) > 1}
    if shared and on_bad_file == "error":
        raise DataError(
            f"{manifest.source}: {len(shared)} images are in more than one split, which invalidates the test metrics:\n"
            + _listed(
                " = ".join(f"{where[split]} ({split})" for split in SPLITS if split in where)
                for where in shared.values()
            )
            + "\nKeep each image in one split, or skip the copies with --data.on_bad_file skip."
        )
    # `test` keeps its copy before `val`, and `val` before `train`.
    split_of = {digest: max(where, key=SPLITS.index) for digest, where in shared.items()}
    return manifest.with_samples(
        [s for s in manifest.samples if split_of.get(scanned.groups[s.key], s.split) == s.split]
    )


def drop_contradictory(manifest: Manifest, scanned: Scan, on_bad_file: str) -> Manifest:
    """Return the manifest without images whose copies have other labels. DataError lists them if `on_bad_file` is `error`."""
    labels: dict[str, dict[tuple[int, ...], str]] = defaultdict(dict)
    for sample in manifest.samples:
        labels[scanned.hashes[sample.key]].setdefault(tuple(sorted(sample.labels)), sample.path)
    contradictory = {digest: where for digest, where in labels.items() if len(where) > 1}
    if contradictory and on_bad_file == "error":
        named = (
            " = ".join(
                f"{path} ({';'.join(manifest.labels[i] for i in indices) or '-'})" for indices, path in where.items()
            )
            for where in contradictory.values()
        )
        raise DataError(
            f"{manifest.source}: {len(contradictory)} images have copies with other labels:\n"
            + _listed(named)
            + "\nCorrect the labels, or skip these images with --data.on_bad_file skip."
        )
    return manifest.with_samples(
        [sample for sample in manifest.samples if scanned.hashes[sample.key] not in contradictory]
    )


def check_classes(manifest: Manifest) -> list[str]:
    """Return warnings about the classes of a split manifest. DataError for classes that cannot be trained or measured."""
    counts, train_counts = manifest.counts(), manifest.counts("train")
    if manifest.empty:
        raise DataError(
            f"{manifest.source}: {len(manifest.empty)} class folders contain no images:\n"
            + _listed(manifest.empty)
            + "\nAdd images or remove the folders."
        )
    vanished = [label for label, count in counts.items() if count == 0]
    if vanished:
        raise DataError(
            f"{manifest.source}: {len(vanished)} classes have no readable image:\n{_listed(vanished)}"
            "\nAdd readable images, or remove these classes."
        )
    single = [label for label, count in counts.items() if count == 1]
    if single:
        raise DataError(
            f"{manifest.source}: {len(single)} classes have one image; training and measuring need two or more:\n"
            + _listed(single)
            + "\nAdd images, or remove these classes."
        )
    untrained = [label for label, count in train_counts.items() if count == 0]
    if untrained:
        raise DataError(
            f"{manifest.source}: {len(untrained)} classes have images in val or test, but none in train:\n"
            + _listed(untrained)
            + "\nAdd training images, remove these classes, or move images without a label elsewhere."
        )
    missing = [split for split in SPLITS if not manifest.of(split)]
    if missing:
        raise DataError(
            f"{manifest.source}: {len(manifest.samples)} images are too few to draw the split {missing[0]}; add images, or raise "
            "data.val_fraction and data.test_fraction"
        )
    warnings = []
    for split in manifest.splits():
        absent = [label for label, count in manifest.counts(split).items() if count == 0]
        if absent:
            warnings.append(f"{split}: no image of {', '.join(absent[:SHOWN])}; its metrics exclude them")
    warnings += [*manifest.notes, *(f"{line}; they are skipped" for line in skipped_lines(manifest.skipped))]
    if manifest.loose:
        warnings.append(
            f"{len(manifest.loose)} images are outside the class folders and are skipped, such as {manifest.loose[0]}"
        )
    return warnings


def remark_lines(remarks: Mapping[str, str]) -> list[str]:
    """Return one line per kind of remark on decoded images, with its count and an example. remarks: path → `KIND: details`."""
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, remark in remarks.items():
        kind, _, details = remark.partition(": ")
        kinds[kind].append((path, details))
    return [
        f"{kind}: {len(shown)} image{'s' * (len(shown) > 1)}, such as {shown[0][0]} ({shown[0][1]})"
        for kind, shown in kinds.items()
    ]


def _scan_one(sample: Sample) -> tuple[str, bytes, str, str]:
    """Return (SHA-256, difference hash, "", remark or ""), or ("", b"", reason, "") for an unreadable image."""
    try:
        data = sample.read()
        part = decode_part(data, None)
        image_hash = difference_hash(part.pixels)
    except OSError as error:
        return "", b"", error.strerror or str(error), ""
    except ValueError as error:  # an ImageError, or a path with a NUL character
        return "", b"", str(error), ""
    return hashlib.sha256(data).hexdigest(), image_hash, "", "; ".join(part.remarks)


def _listed(lines: Iterable[str]) -> str:
    shown = list(lines)
    rest = [f"  … and {len(shown) - SHOWN} more"] if len(shown) > SHOWN else []
    return "\n".join([f"  {line}" for line in shown[:SHOWN]] + rest)
