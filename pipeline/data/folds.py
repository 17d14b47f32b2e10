"""Divide the training and validation samples into folds: stratified by label, with near-duplicates in one fold."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from refract.augment.random import generator
from refract.pipeline.data.manifest import DataError, Manifest, Sample
from refract.pipeline.data.near_duplicates import near_duplicates_among

SHOWN = 10
"""Labels that an error lists."""


def draw_folds(
    manifest: Manifest, digests: Mapping[str, str], hashes: Mapping[str, bytes], *, folds: int, seed: int
) -> dict[str, int]:
    """Return the fold, in 1…folds, of each sample of `train` and `val`, by its key.

    digests: sample key → content hash; hashes: path → `difference_hash`. Copies and near-duplicates get the same fold, also those that are
    near-duplicates through others. Each fold has about the same number of samples of each label. The folds depend on the seed and the
    content, not on paths or the order of the samples.
    Raises DataError if a fold would have no samples, or if one fold would have all samples of a label.
    """
    samples = [sample for sample in manifest.samples if sample.split in ("train", "val")]
    groups = groups_of([digests[sample.key] for sample in samples], near_duplicates_among(samples, hashes))
    if len(groups) < folds:
        raise DataError(
            f"{manifest.source}: trainer.folds: {folds} needs as many groups of training and validation samples, got {len(groups)}; "
            "copies and near-duplicates are one group. Reduce trainer.folds, or add images"
        )
    drawn = stratified_folds(samples, groups, folds=folds, seed=seed)
    fold_of = {sample.key: fold for sample, fold in zip(samples, drawn, strict=True)}
    _check_labels(manifest, samples, fold_of)
    return fold_of


def stratified_folds(samples: Sequence[Sample], groups: Sequence[Sequence[int]], *, folds: int, seed: int) -> list[int]:
    """Return the fold, in 1…folds, of each sample. groups: indices of samples that get the same fold; each sample is in one group."""
    order = generator(seed, 0, 0, "folds").permutation(len(groups))
    groups = [groups[k] for k in order]
    drawn = _stratified([Counter(label for i in group for label in samples[i].labels) for group in groups],
                        [len(group) for group in groups], folds)  # fmt: skip
    fold_of = [0] * len(samples)
    for group, fold in zip(groups, drawn, strict=True):
        for i in group:
            fold_of[i] = fold
    return fold_of


def with_fold(manifest: Manifest, fold_of: Mapping[str, int], fold: int) -> Manifest:
    """Return the manifest with the samples of the fold as `val`, and those of the other folds as `train`."""
    samples = [
        sample.with_split("val" if fold_of[sample.key] == fold else "train") if sample.key in fold_of else sample
        for sample in manifest.samples
    ]
    return replace(manifest, samples=tuple(samples), drawn=tuple(dict.fromkeys([*manifest.drawn, "val"])))


def groups_of(digests: Sequence[str], pairs: Sequence[tuple[int, int]] = ()) -> list[list[int]]:
    """Return the indices of the samples of each group that one fold must hold, in the order of the smallest content hash.

    digests: content hash of each sample; samples with the same hash are in one group. pairs: indices of near-duplicates.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first: dict[str, int] = {}
    copies = [(i, first.setdefault(digest, i)) for i, digest in enumerate(digests)]
    edges = np.array([*copies, *pairs]).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(len(digests), len(digests)))
    members: dict[int, list[int]] = defaultdict(list)
    for i, component in enumerate(connected_components(graph, directed=False)[1].tolist()):
        members[component].append(i)
    return sorted(members.values(), key=lambda group: min(digests[i] for i in group))


def _stratified(label_counts: Sequence[Counter[int]], sizes: Sequence[int], folds: int) -> list[int]:
    """Return the fold, in 1…folds, of each group.

    label_counts: the samples of each label in the group; sizes: the samples of the group.
    Source: iterative stratification, Sechidis et al. 2011, "On the stratification of multi-label data", for groups in place of samples:
    the rarest label is divided first, and each group goes to the fold that lacks most samples of the label. Deviations: the largest groups
    of a label come first, groups with the same labels follow each other, and the order of the groups decides ties.
    """
    groups_of: dict[int, list[int]] = defaultdict(list)
    for group, counts in enumerate(label_counts):
        for label in counts:
            groups_of[label].append(group)
    remaining = Counter[int]()
    for counts in label_counts:
        remaining.update(counts)
    lacking = {label: np.full(folds, total / folds) for label, total in remaining.items()}
    lacking_samples = np.full(folds, sum(sizes) / folds)
    fold_of: dict[int, int] = {}

    def assign(group: int, wanted: np.ndarray) -> None:
        fold = max(range(folds), key=lambda k: (round(float(wanted[k]), 6), round(float(lacking_samples[k]), 6), -k))
        fold_of[group] = fold + 1
        lacking_samples[fold] -= sizes[group]
        for label, count in label_counts[group].items():
            lacking[label][fold] -= count
            remaining[label] -= count

    unassigned = set(groups_of)
    while unassigned:
        label = min(unassigned, key=lambda label: (remaining[label], label))
        unassigned.remove(label)
        for group in sorted(
            groups_of[label], key=lambda group: (-label_counts[group][label], sorted(label_counts[group]))
        ):
            if group not in fold_of:
                assign(group, lacking[label])
    for group in sorted(range(len(sizes)), key=lambda group: -sizes[group]):  # samples without a label
        if group not in fold_of:
            assign(group, lacking_samples)
    return [fold_of[group] for group in range(len(sizes))]


def _check_labels(manifest: Manifest, samples: Sequence[Sample], fold_of: Mapping[str, int]) -> None:
    folds_of: dict[int, set[int]] = defaultdict(set)
    for sample in samples:
        for label in sample.labels:
            folds_of[label].add(fold_of[sample.key])
    single = [manifest.labels[label] for label, folds in sorted(folds_of.items()) if len(folds) == 1]
    if single:
        more = " …" if len(single) > SHOWN else ""
        raise DataError(
            f"{manifest.source}: trainer.folds: {len(single)} labels have all their training and validation samples in one fold, as these "
            f"are a single image or near-duplicates: {', '.join(single[:SHOWN])}{more}. The model of that fold could not train on them. "
            "Add images that differ, or set trainer.folds: 0"
        )
