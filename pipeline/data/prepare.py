"""The data of a config as training takes them: checked, and split."""

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

from refract.models.bundle.info import BundleInfo
from refract.pipeline.config.config import Config, config_from_dict
from refract.pipeline.data.manifest import DataError, Manifest, load_manifest
from refract.pipeline.data.near_duplicates import near_pairs
from refract.pipeline.data.splits import draw_splits
from refract.pipeline.data.validation import (
    check_classes,
    drop_bad,
    drop_contradictory,
    drop_shared,
    remark_lines,
    scan,
)
from refract.pipeline.training.build import check_inputs, reads

log = logging.getLogger(__name__)


def prepare_data(config: Config) -> tuple[Manifest, dict[str, str]]:
    """(the checked and split manifest, what it is known by again: its `content` and, with the splits, its `fingerprint`). DataError lists
    what is wrong with the data."""

    manifest = load_manifest(config.data.source, config.data.task)
    log.info("checking %s samples of %s", f"{len(manifest.samples):,}", manifest.source)
    check_inputs(config, manifest)
    found = scan(manifest.samples, reads=reads(config))
    manifest = drop_bad(manifest, found, config.data.on_bad_file)
    content, whole = found.content(manifest), manifest
    manifest = drop_contradictory(manifest, found, config.data.on_bad_file)
    _tell_left_out("whose copies carry other labels", whole, manifest)
    manifest = draw_splits(
        manifest,
        found.groups,
        val_fraction=config.data.val_fraction,
        test_fraction=config.data.test_fraction,
        seed=config.trainer.seed,
    )
    whole = manifest
    manifest = drop_shared(manifest, found, config.data.on_bad_file)
    _tell_left_out("whose copies are in another split", whole, manifest)
    for warning in check_classes(manifest):
        log.warning("data: %s", warning)
    if found.bad:
        log.warning("data: left out %d unreadable images", len(found.bad))
    for line in remark_lines(found.remarks):
        log.warning("data: %s", line)
    manifest = replace(manifest, near=near_pairs(manifest, found.looks))
    if manifest.near:
        split_of = {sample.path: sample.split for sample in manifest.samples}
        counts = Counter(split_of[path] for path, _ in manifest.near)
        told = " and ".join(f"{counts[split]} images of {split}" for split in ("val", "test") if counts[split])
        log.warning(
            "data: %s look like one of train, as %s like %s: their figures may be too good", told, *manifest.near[0]
        )
    return manifest, {"fingerprint": found.fingerprint(manifest), "content": content}


def _tell_left_out(which: str, before: Manifest, after: Manifest) -> None:
    kept = {sample.key for sample in after.samples}
    gone = [sample.path for sample in before.samples if sample.key not in kept]
    if gone:
        log.warning("data: left out %d images %s, as %s", len(gone), which, gone[0])


def held_out(info: BundleInfo, manifest: Manifest) -> Manifest:
    """The data as they were split for training where these are the training data: what was learned by heart must not count as known.

    They are known by their content. DataError where they lie where the training data lay but are others now: which of them were trained on
    cannot be told any more.
    """
    config = config_from_dict(info.config)
    config.data.source = manifest.source
    found = scan(manifest.samples, reads=reads(config))
    readable = drop_bad(manifest, found, "skip")
    if found.content(readable) == info.data.get("content"):
        print("these are the images that the bundle was trained on; measuring its own hold-out")
        split, identity = prepare_data(config)
        if identity["fingerprint"] == info.data.get("fingerprint"):
            return split
    elif Path(manifest.source).resolve() != Path(info.data.get("source", "")).resolve():
        return manifest
    raise DataError(
        f"{manifest.source}: has changed since the bundle was trained on it, so its hold-out cannot be told from what was trained on. "
        "Measure on the run's splits.csv, which remembers, or on other images."
    )
