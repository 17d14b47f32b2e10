"""Check all samples before training: unreadable images, copies in two splits, contradictory labels, classes without training images."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from refract.pipeline.data.manifest import SPLITS, DataError, Manifest
from refract.pipeline.data.scan import Scan
from refract.pipeline.data.sources.folders import skipped_lines

SHOWN = 20
"""Entries that an error lists."""


def check_inputs(manifest: Manifest, reads: frozenset[str]) -> None:
    """Raise DataError for samples without any modality that the network reads, see `Config.reads`."""
    from refract.models.multimodal.tokens import trimmed

    empty = [
        s
        for s in manifest.samples
        if not ((s.has_image and "images" in reads) or (trimmed(s.text) and "texts" in reads))
    ]
    if empty:
        missing = "image" if reads == {"images"} else "text" if reads == {"texts"} else "image and no text"
        hint = "; to read texts, set text.name: hashing" if reads == {"images"} else ""
        raise DataError(f"{manifest.source}: {len(empty)} samples have no {missing}, such as {empty[0].path}{hint}")
    if "texts" in reads and not any(trimmed(sample.text) for sample in manifest.samples):
        raise DataError(
            f"{manifest.source}: the data have no texts (column `text`) for the text network; set text.name: none"
        )


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


def _listed(lines: Iterable[str]) -> str:
    shown = list(lines)
    rest = [f"  … and {len(shown) - SHOWN} more"] if len(shown) > SHOWN else []
    return "\n".join([f"  {line}" for line in shown[:SHOWN]] + rest)
