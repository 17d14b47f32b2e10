"""Which images train, validate and test. What the data does not say is drawn, stratified, from the seed."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from refract.augment.random import generator
from refract.pipeline.data.manifest import Manifest, Sample


def draw_splits(
    manifest: Manifest, hashes: Mapping[str, str], *, val_fraction: float, test_fraction: float, seed: int
) -> Manifest:
    """Give every sample a split.

    hashes: a sample's key → content hash; copies of one image go together, so that none is both trained on and measured. Data without
    splits
    gets both drawn; data with splits gets the missing ones of `val` and `test` drawn from `train`. Within each class the shares hold to
    the image, and a class of three or more has one in each; for multilabel, within each set of labels that ten images or more carry,
    and within the rest together.
    """
    present = manifest.splits()
    shares = {"test": test_fraction, "val": val_fraction}
    wanted = {split: share for split, share in shares.items() if split not in present}
    groups: dict[tuple[int, ...], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    carried = Counter(sample.labels for sample in manifest.samples)
    for i, sample in enumerate(manifest.samples):
        if sample.split in ("", "train"):
            rare = manifest.task == "multilabel" and carried[sample.labels] < 10
            groups[() if rare else sample.labels][hashes[sample.key]].append(i)
    split_of: dict[int, str] = {}
    taken: dict[str, str] = {}
    for labels, copies in sorted(groups.items()):
        free = sorted(key for key in copies if key not in taken)
        order = [free[k] for k in generator(seed, 0, 0, f"split {labels}").permutation(len(free))]
        start = 0
        for split, share in wanted.items():
            count = round(share * len(free))
            if len(free) >= len(wanted) + 1:
                count = max(1, count)
            taken.update(dict.fromkeys(order[start : start + count], split))
            start += count
        for key, indices in copies.items():
            for i in indices:
                split_of[i] = taken.setdefault(key, "train")
    samples = tuple(replace(s, split=split_of.get(i, s.split)) for i, s in enumerate(manifest.samples))
    return replace(manifest, samples=samples, drawn=tuple(wanted))


def _written(sample: Sample) -> str:
    if not sample.has_image:
        return ""
    return sample.path if sample.data is not None else str(Path(sample.path).resolve())


def write_splits(manifest: Manifest, path: Path) -> None:
    """A CSV manifest (path,label,split,text and the metadata) of the data as it was split; `refract train` reads it again."""
    import csv

    import pandas as pd

    rows = [
        {
            "path": _written(sample),
            "label": ";".join(manifest.labels[i] for i in sample.labels),
            "split": sample.split,
            "text": sample.text,
            **sample.metadata,
        }
        for sample in manifest.samples
    ]
    # All quoted: pandas would write a lone carriage return bare, and read it as the row's end.
    pd.DataFrame(rows).to_csv(path, index=False, quoting=csv.QUOTE_ALL)
