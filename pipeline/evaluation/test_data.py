"""The labelled samples on which a bundle is measured."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from refract.models.bundle.info import BundleInfo
from refract.pipeline.data.manifest import DataError, Manifest, Sample, load_manifest
from refract.pipeline.data.prepare import split_as_trained
from refract.pipeline.data.sources.folders import inner_hint, label_of


def labelled_data(source: str, info: BundleInfo) -> tuple[Manifest, bool]:
    """Return the data, and whether their test split is drawn as in the bundle's training, as the data have none. DataError as
    `load_manifest`."""
    manifest = load_manifest(source, "multilabel" if info.task == "multilabel" else "multiclass", to_train=False)
    if "test" not in manifest.splits():
        return split_as_trained(info, manifest), True  # logs the skipped entries
    return manifest, False


def samples_of(manifest: Manifest, labels: Sequence[str], split: str | None = None) -> tuple[list[Sample], str | None]:
    """Return the samples of a split, with the label indices of the bundle, and the name of the split, None for all samples.

    split: the name, None for test if the data have one, else for all samples. DataError if there are none, and for labels that the bundle
    lacks.
    """
    samples = relabelled(manifest, labels)
    split = split or ("test" if "test" in manifest.splits() else None)
    if split is not None:
        samples = [sample for sample in samples if sample.split == split]
    if not samples:
        raise DataError(
            f"{manifest.source}: no images in the split {split}; splits: {', '.join(manifest.splits()) or 'none'}"
        )
    return samples, split


def relabelled(manifest: Manifest, labels: Sequence[str]) -> list[Sample]:
    """Return the samples with the label indices of the bundle. DataError names labels that the bundle lacks."""
    index_of = {label_of(label): index for index, label in enumerate(labels)}
    unknown = [label for label in manifest.labels if label not in index_of]
    if unknown:
        hint = inner_hint(manifest.source) if Path(manifest.source).is_dir() else ""
        raise DataError(
            f"{manifest.source}: {len(unknown)} labels are not labels of the bundle: {', '.join(unknown[:20])}; its labels: "
            f"{', '.join(labels[:20])}{' …' if len(labels) > 20 else ''}{hint}"
        )
    bundle_index = [index_of[label] for label in manifest.labels]
    return [replace(sample, labels=tuple(bundle_index[i] for i in sample.labels)) for sample in manifest.samples]
