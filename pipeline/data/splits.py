"""Draw the missing splits of a data set, stratified by class, from the seed."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from refract.augment.random import generator
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.data.storage import absolute
from refract.pipeline.files import written_atomically


def draw_splits(
    manifest: Manifest, hashes: Mapping[str, str], *, val_fraction: float, test_fraction: float, seed: int
) -> Manifest:
    """Return the manifest with a split for every sample.

    hashes: sample key → content hash. Copies of an image get the same split, so that no image is both trained on and measured.
    `val` and `test` are drawn if the data lacks them, from `train` or from samples without a split. The fractions hold within each class,
    rounded to whole images, and a class of three or more images has one in each split. For multilabel they hold within each label set of
    ten images or more, and within all other images together.
    """
    present = manifest.splits()
    fractions = {"test": test_fraction, "val": val_fraction}
    wanted = {split: fraction for split, fraction in fractions.items() if split not in present}
    groups: dict[tuple[int, ...], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    set_counts = Counter(sample.labels for sample in manifest.samples)
    for i, sample in enumerate(manifest.samples):
        if sample.split in ("", "train"):
            rare = manifest.task == "multilabel" and set_counts[sample.labels] < 10
            groups[() if rare else sample.labels][hashes[sample.key]].append(i)
    split_of: dict[int, str] = {}
    assigned: dict[str, str] = {}
    for labels, copies in sorted(groups.items()):
        free = sorted(key for key in copies if key not in assigned)
        order = [free[k] for k in generator(seed, 0, 0, f"split {labels}").permutation(len(free))]
        start = 0
        for split, fraction in wanted.items():
            count = round(fraction * len(free))
            if len(free) >= len(wanted) + 1:
                count = max(1, count)
            assigned.update(dict.fromkeys(order[start : start + count], split))
            start += count
        for key, indices in copies.items():
            for i in indices:
                split_of[i] = assigned.setdefault(key, "train")
    samples = tuple(s.with_split(split_of.get(i, s.split)) for i, s in enumerate(manifest.samples))
    return replace(manifest, samples=samples, drawn=tuple(wanted))


def extend_splits(
    manifest: Manifest,
    drawn: Manifest,
    hashes: Mapping[str, str],
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> Manifest:
    """Return the manifest with the splits of `drawn`, and splits for the samples that `drawn` lacks, such as added ones.

    drawn: the result of `draw_splits` for other samples or labels of the same source; hashes: sample key → content hash, equal for copies
    in one of the two only. A further sample gets one of the drawn splits, by its content and the seed alone, so that it keeps its split
    when more samples are added. A class without training samples gets one of the samples whose split was drawn.
    """
    split_of = {sample.key: sample.split for sample in drawn.samples}
    for sample in manifest.samples:
        if sample.key not in split_of:
            split_of[sample.key] = sample.split or _split_by_content(
                hashes[sample.key], drawn.drawn, val_fraction, test_fraction, seed
            )
    groups: dict[int, set[str]] = defaultdict(set)
    for sample in manifest.samples:
        for label in sample.labels:
            groups[label].add(hashes[sample.key])
    split_of_hash = {hashes[sample.key]: split_of[sample.key] for sample in manifest.samples}
    moved: set[str] = set()
    for _, group in sorted(groups.items()):
        movable = sorted(digest for digest in group if split_of_hash[digest] in drawn.drawn)
        if movable and all(split_of_hash[digest] != "train" for digest in group):
            split_of_hash[movable[0]] = "train"
            moved.add(movable[0])
    samples = (s.with_split("train" if hashes[s.key] in moved else split_of[s.key]) for s in manifest.samples)
    return replace(manifest, samples=tuple(samples), drawn=drawn.drawn)


def _split_by_content(digest: str, drawn: Sequence[str], val_fraction: float, test_fraction: float, seed: int) -> str:
    number = int(hashlib.sha256(f"{seed} {digest}".encode()).hexdigest()[:12], 16) / 16**12
    if "test" in drawn and number < test_fraction:
        return "test"
    return "val" if "val" in drawn and test_fraction <= number < test_fraction + val_fraction else "train"


def _path_column(sample: Sample) -> str:
    if not sample.has_image:
        return ""
    return sample.path if sample.data is not None else absolute(sample.path)


def write_splits(manifest: Manifest, path: Path) -> None:
    """Write the split data as a CSV manifest (path,label,split,text and the metadata) that `refract train` reads, atomically."""
    import csv
    import io

    import pandas as pd

    rows = [
        {
            "path": _path_column(sample),
            "label": ";".join(manifest.labels[i] for i in sample.labels),
            "split": sample.split,
            "text": sample.text,
            **sample.metadata,
        }
        for sample in manifest.samples
    ]
    # Quote all values: pandas writes a lone carriage return unquoted, and reads it as the end of the row.
    with written_atomically(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        pd.DataFrame(rows).to_csv(text, index=False, quoting=csv.QUOTE_ALL)
        text.detach()  # which flushes it, and leaves the file open
