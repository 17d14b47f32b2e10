"""Load the data of a config: check it and split it for training."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from refract.errors import RefractError
from refract.models.bundle.info import BundleInfo
from refract.pipeline.config.config import Config, config_from_dict
from refract.pipeline.config.sections import DataConfig
from refract.pipeline.data.folds import draw_folds, with_fold
from refract.pipeline.data.hierarchy import with_hierarchy
from refract.pipeline.data.manifest import DataError, Manifest, load_manifest, reject_untrainable
from refract.pipeline.data.near_duplicates import near_pairs
from refract.pipeline.data.scan import Scan, scan
from refract.pipeline.data.splits import draw_splits, extend_splits
from refract.pipeline.data.validation import (
    check_classes,
    check_inputs,
    drop_bad,
    drop_contradictory,
    drop_shared,
    remark_lines,
)

if TYPE_CHECKING:
    from refract.pipeline.labels.apply import AppliedLabels

log = logging.getLogger(__name__)


def prepare_data(config: Config) -> tuple[Manifest, dict[str, str]]:
    """Return (the checked and split manifest, its identity).

    The identity holds two SHA-256 digests: `content` without the splits, `fingerprint` with them. With `data.labels`, both are those of the
    corrected data, and the identity also has `AppliedLabels.identity`. With `trainer.fold`, that fold is the validation set. DataError
    lists the problems of the data.
    """
    if config.trainer.fold is not None:
        return prepare_folds(config).of(config.trainer.fold)
    return _completed(*_checked(config))


@dataclass(frozen=True)
class FoldedData:
    """The data of a training in folds.

    manifest: with the splits of a training without folds; fold_of: key of a training or validation sample → its fold, from 1 on;
    digests: sample key → SHA-256 of the image, or of the text of a sample without an image; fingerprint: the fingerprint of the manifest;
    identity: the identity of the data, without a fingerprint.
    """

    manifest: Manifest
    fold_of: Mapping[str, int]
    scanned: Scan
    identity: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        return self.scanned.fingerprint(self.manifest)

    @property
    def digests(self) -> Mapping[str, str]:
        return self.scanned.groups

    def of(self, fold: int) -> tuple[Manifest, dict[str, str]]:
        """Return what `prepare_data` returns for the fold."""
        return _completed(with_fold(self.manifest, self.fold_of, fold), self.scanned, self.identity)


def prepare_folds(config: Config) -> FoldedData:
    """Check the data and draw the folds. DataError as `prepare_data`, and for data that cannot be divided into this many folds."""
    manifest, scanned, identity = _checked(config)
    fold_of = draw_folds(
        manifest, scanned.groups, scanned.difference_hashes, folds=config.trainer.folds, seed=config.trainer.seed
    )
    return FoldedData(manifest, fold_of, scanned, identity)


@dataclass(frozen=True)
class ReadSamples:
    """The readable samples of a config's data, before they are split.

    source: with the labels of the source; manifest: with the decisions of `data.labels`; scanned: the scan of the manifest's samples;
    identity: of the data, without a fingerprint.
    """

    source: Manifest
    manifest: Manifest
    scanned: Scan
    identity: Mapping[str, str]


def read_samples(data: DataConfig, reads: frozenset[str]) -> ReadSamples:
    """Read and decode all samples, and apply the decisions of `data.labels`. DataError for data that cannot be trained on.

    reads: `Config.reads`.
    """
    source = load_manifest(data.source, data.task, to_train=data.labels is None)
    if data.labels is None:  # else the decisions may add classes
        source = with_hierarchy(source, data.hierarchy)
    log.info("checking %s samples of %s", f"{len(source.samples):,}", source.source)
    check_inputs(source, reads)
    scanned = scan(source.samples, reads=reads)
    source = drop_bad(source, scanned, data.on_bad_file)
    manifest, scanned, applied = with_labels(data, source, scanned, reads)
    if applied is not None:
        manifest = with_hierarchy(manifest, data.hierarchy)
    identity = {"content": scanned.content(manifest)} | ({} if applied is None else applied.identity())
    return ReadSamples(source, manifest, scanned, identity)


def _checked(config: Config) -> tuple[Manifest, Scan, dict[str, str]]:
    """Return (the split manifest without bad samples, its scan, the identity without a fingerprint)."""
    data, samples = config.data, read_samples(config.data, config.reads)
    before, scanned = samples.manifest, samples.scanned
    manifest = drop_contradictory(before, scanned, data.on_bad_file)
    _log_skipped("whose copies have other labels", before, manifest)
    manifest = _split(data, config.trainer.seed, samples.source, manifest, scanned)
    before = manifest
    manifest = drop_shared(manifest, scanned, data.on_bad_file)
    _log_skipped("whose copies are in another split", before, manifest)
    if scanned.bad:
        log.warning("data: skipped %d unreadable images", len(scanned.bad))
    for line in remark_lines(scanned.remarks):
        log.warning("data: %s", line)
    return manifest, scanned, dict(samples.identity)


def with_labels(
    data: DataConfig, manifest: Manifest, scanned: Scan, reads: frozenset[str]
) -> tuple[Manifest, Scan, "AppliedLabels | None"]:
    """Apply the label history of `data.labels`, if there is one, and log what it changes.

    manifest: the readable samples. Returns (the corrected manifest, its scan, the summary). Raises as `apply_labels`, and DataError for
    data that cannot be trained on.
    """
    if data.labels is None:
        return manifest, scanned, None
    from refract.pipeline.labels.address import split_address
    from refract.pipeline.labels.apply import apply_labels

    manifest, scanned, applied = apply_labels(data.labels, data.task, manifest, scanned, reads)
    reject_untrainable(manifest)
    log.info("labels: %s", applied.text())
    if applied.not_applied:
        log.warning(
            "labels: decisions that are not applied: %d, such as %s", len(applied.not_applied), applied.not_applied[0]
        )
    if applied.conflicts:
        log.warning(
            "labels: images with conflicting decisions, of which the last applies: %d; `refract labels log %s --conflicts` lists them",
            applied.conflicts,
            split_address(data.labels)[0],
        )
    return manifest, scanned, applied


def _split(data: DataConfig, seed: int, source: Manifest, manifest: Manifest, scanned: Scan) -> Manifest:
    """Draw the missing splits. Corrected samples keep the split that they have without decisions."""
    fractions = {"val_fraction": data.val_fraction, "test_fraction": data.test_fraction}
    if data.labels is None:
        return draw_splits(manifest, scanned.groups, **fractions, seed=seed)
    without_decisions = drop_contradictory(source, scanned, "skip")
    drawn = draw_splits(without_decisions, scanned.groups, **fractions, seed=seed)
    return extend_splits(manifest, drawn, scanned.groups, **fractions, seed=seed)


def _completed(manifest: Manifest, scanned: Scan, identity: Mapping[str, str]) -> tuple[Manifest, dict[str, str]]:
    """Check the classes, and add the near-duplicates. Returns what `prepare_data` returns."""
    for warning in check_classes(manifest):
        log.warning("data: %s", warning)
    manifest = replace(manifest, near=near_pairs(manifest, scanned.difference_hashes))
    if manifest.near:
        split_of = {sample.path: sample.split for sample in manifest.samples}
        counts = Counter(split_of[path] for path, _ in manifest.near)
        images = " and ".join(f"{counts[split]} images of {split}" for split in ("val", "test") if counts[split])
        log.warning(
            "data: %s are near-duplicates of training images, such as %s of %s; their metrics may be too high",
            images,
            *manifest.near[0],
        )
    return manifest, {"fingerprint": scanned.fingerprint(manifest), **identity}


def _log_skipped(which: str, before: Manifest, after: Manifest) -> None:
    remaining = {sample.key for sample in after.samples}
    skipped = [sample.path for sample in before.samples if sample.key not in remaining]
    if skipped:
        log.warning("data: skipped %d images %s, such as %s", len(skipped), which, skipped[0])


def split_as_trained(info: BundleInfo, manifest: Manifest, use: str = "measuring its test split") -> Manifest:
    """Return the manifest split as in training if it is the bundle's training data, else unchanged. use: of the splits, for the terminal.

    The training data is recognised by its content, so that training images are not measured. DataError if the data is at the path of the
    training data but has changed: the training images can then no longer be identified.
    """
    # The bundle has the hierarchy; its file may be on another machine.
    config = config_from_dict(info.config).changed({"data.source": manifest.source, "data.hierarchy": None})
    scanned = scan(manifest.samples, reads=config.reads)
    readable = drop_bad(manifest, scanned, "skip")
    if _content_with_labels(config.data, readable, scanned, config.reads) == info.data.get("content"):
        print(f"these are the training images of the bundle; {use}")
        split, identity = prepare_data(config)
        if identity["fingerprint"] == info.data.get("fingerprint"):
            return split
    elif Path(manifest.source).resolve() != Path(info.data.get("source", "")).resolve():
        return manifest
    raise DataError(
        f"{manifest.source}: has changed since the bundle was trained on it, so its test images can no longer be identified. "
        "Measure on the run's splits.csv, which lists the splits, or on other images."
    )


def _content_with_labels(data: DataConfig, readable: Manifest, scanned: Scan, reads: frozenset[str]) -> str:
    """Return the content with the decisions of `data.labels`, or without them if they do not fit these samples."""
    if data.labels is not None:
        from refract.pipeline.labels.apply import apply_labels

        try:
            readable, scanned, _ = apply_labels(data.labels, data.task, readable, scanned, reads)
        except RefractError as error:
            log.debug("data.labels of the bundle is not applied: %s", error)
    return scanned.content(readable)
