"""Gather the images of a review: the data set of a config or bundle, captured images of a server, and unlabelled images."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from refract.models.bundle.bundle import Bundle
from refract.models.familiarity import Reduced
from refract.pipeline.config.config import Config
from refract.pipeline.data.manifest import DataError, Manifest, Sample, load_manifest
from refract.pipeline.data.near_duplicates import near_duplicates_among
from refract.pipeline.data.new_data import read_data
from refract.pipeline.data.prepare import read_samples
from refract.pipeline.data.storage import absolute
from refract.pipeline.features.embed import Options, embed, source_name
from refract.pipeline.features.heads import Part
from refract.pipeline.features.model import EmbeddingModel
from refract.pipeline.features.store import FeatureStore
from refract.pipeline.inference.scoring import SampleInput, preprocess_of, score
from refract.pipeline.labels.history import LabelHistory
from refract.pipeline.review.captured import CapturedImage, captured_images
from refract.pipeline.review.data import Captured, Predictions, ReviewData, listed
from refract.pipeline.review.decisions import ORIGIN
from refract.pipeline.review.items import Item
from refract.pipeline.review.predict import choose, predict, robust_out_of_fold
from refract.pipeline.review.queues import AUDIT
from refract.pipeline.review.queues.served import familiarities
from refract.pipeline.stopping import Stop
from refract.progress import tracked

log = logging.getLogger(__name__)

SHOWN = 5
"""Predictions that an item keeps."""

REFERENCE = 2000
"""Images of the data set whose distances to each other define what is familiar."""


@dataclass(frozen=True)
class Sources:
    """What a review shows besides the data of the config.

    captured: folder of a server's `--sample`; feedback: folder of its `--feedback-dir`; unlabelled: a source of new images;
    splits: path of a run's `splits.csv`, which says what the bundle was not trained on; bundle, challenger: None without.
    """

    captured: Path | None = None
    feedback: Path | None = None
    unlabelled: str | None = None
    splits: Path | None = None
    bundle: Bundle | None = None
    challenger: Bundle | None = None


@dataclass(frozen=True)
class _New:
    """A new image. content: SHA-256 of its bytes; captured: None for an image of the unlabelled source."""

    sample: Sample
    content: str
    captured: Captured | None = None


def gather(config: Config, model: EmbeddingModel, sources: Sources, history: LabelHistory, stop: Stop) -> ReviewData:
    """Read, embed and predict all images.

    config: its `data.labels` is the history; model: whose embeddings the head of the predictions reads. Embeddings come from the store
    `data.features` where it has them. DataError for unusable data, Stopped after a stop signal; finished embeddings stay in the store.
    """
    read = read_samples(replace(config.data, on_bad_file="skip"), config.reads)
    manifest, contents = read.manifest, read.scanned.images
    samples, contradictory = _distinct(manifest, contents)
    new = _new_images(sources, set(contents.values()))
    vectors, embedded = _embedded(model, Path(config.data.features), manifest, samples, new, stop)
    samples = [sample for sample, known in zip(samples, embedded, strict=False) if known]
    new = [one for one, known in zip(new, embedded[len(embedded) - len(new) :], strict=True) if known]
    if len(samples) < 2:
        raise DataError(f"{manifest.source}: no two images can be embedded, so there is nothing to review")
    targets = np.zeros((len(samples), len(manifest.labels)), bool)
    for row, sample in zip(targets, samples, strict=True):
        row[list(sample.labels)] = True
    part = Part(vectors[: len(samples)], targets)
    multilabel = manifest.task == "multilabel"
    choice = choose(part, multilabel=multilabel)
    digests = [contents[sample.path] for sample in samples]
    out_of_fold = robust_out_of_fold(choice, part, samples, digests, multilabel=multilabel)
    splits, before_audit = _splits(sources, samples), _before_audit(read.source, contents, history)
    items = [
        Item(
            index,
            contents[sample.path],
            sample,
            _path(history, sample),
            _names(manifest, sample),
            splits.get(index, ""),
            before_audit=before_audit.get(contents[sample.path]),
        )
        for index, sample in enumerate(samples)
    ]
    items += [
        Item(len(samples) + i, one.content, one.sample, _path(history, one.sample), ()) for i, one in enumerate(new)
    ]
    fresh = items[len(samples) :]
    predicted = _predicted(sources.bundle, fresh, vectors[len(samples) :], part, manifest, choice)
    folded = Reduced.on(torch.device("cpu"), vectors.shape[1])(torch.from_numpy(vectors)).numpy()
    held = [index for index, split in splits.items() if split in ("val", "test")]
    measured = [*(items[index] for index in sorted(held)), *fresh]
    data = ReviewData(
        tuple(items), tuple(manifest.labels), len(samples), folded, targets, out_of_fold, predicted,
        multilabel=multilabel,
        contradictory={i: contradictory[s.path] for i, s in enumerate(samples) if s.path in contradictory},
        alike=near_duplicates_among(samples, read.scanned.difference_hashes),
        captured={item.index: one.captured for item, one in zip(fresh, new, strict=True) if one.captured is not None},
        champion=_of_bundle(sources.bundle, measured, "predictions of the bundle"),
        challenger=_of_bundle(sources.challenger, measured, "predictions of the challenger"),
        hierarchy=manifest.hierarchy if sources.bundle is None else sources.bundle.info.tree,
    )  # fmt: skip
    return replace(data, items=_described(data))


def _distinct(manifest: Manifest, contents: Mapping[str, str]) -> tuple[list[Sample], dict[str, str]]:
    """Return (one sample with an image for each content, path → a sentence on its copies with other labels)."""
    copies: dict[str, list[Sample]] = defaultdict(list)
    several_texts = 0
    for sample in manifest.samples:
        if sample.has_image and sample.path in contents:
            copies[contents[sample.path]].append(sample)
    if not copies:
        raise DataError(f"{manifest.source}: has no images; a review needs images")
    contradictory = {}
    for content, same in list(copies.items()):
        names = {listed(_names(manifest, sample)): sample.path for sample in same}
        if len(names) > 1 and len({sample.text for sample in same}) > 1:
            several_texts += 1  # a decision is on an image, so it would give all texts one label
            del copies[content]
        elif len(names) > 1:
            named = ", ".join(f"{label} ({_utf8(path)})" for label, path in names.items())
            contradictory[same[0].path] = f"Copies of this image have different labels: {named}."
    if several_texts:
        log.warning("review: %d images that occur with several texts and different labels are skipped", several_texts)
    return [same[0] for same in copies.values()], contradictory


def _before_audit(source: Manifest, contents: Mapping[str, str], history: LabelHistory) -> dict[str, tuple[str, ...]]:
    """Return image → its labels in the source, for the images on which a decision of the audit applies."""
    state = history.state().images
    audited = {content for content, one in state.items() if one.applied.origin == ORIGIN + AUDIT}
    return {
        contents[sample.path]: _names(source, sample)
        for sample in reversed(source.samples)  # of copies, the first counts
        if contents.get(sample.path) in audited
    }


def _names(manifest: Manifest, sample: Sample) -> tuple[str, ...]:
    return tuple(manifest.labels[i] for i in sample.labels)


def _path(history: LabelHistory, sample: Sample) -> str:
    return _utf8(history.relative(sample.path) if sample.data is None else sample.path)


def _utf8(path: str) -> str:
    """Return the path as a text that a decision and a response can hold: the name of a file may be any bytes."""
    return path.encode("utf-8", "replace").decode()


def _new_images(sources: Sources, known: set[str]) -> list[_New]:
    """Return the captured and the unlabelled images, each content once and none of the data set."""
    new: list[_New] = []
    captured: Sequence[CapturedImage] = ()
    if sources.captured is not None:
        captured = captured_images(sources.captured, sources.feedback)
    samples = [Sample(str(one.file), ()) for one in captured]
    if sources.unlabelled is not None:
        unlabelled_samples = read_data(sources.unlabelled, (), multilabel=False, unlabelled=True).samples
        samples += [sample for sample in unlabelled_samples if sample.has_image]
    facts = [*(one.captured for one in captured), *[None] * (len(samples) - len(captured))]
    unreadable = unnamed = 0
    for sample, about in zip(samples, facts, strict=True):
        if about is None and sample.path != _utf8(sample.path):
            unnamed += 1
            continue
        try:
            content = hashlib.sha256(sample.read()).hexdigest()
        except OSError:
            unreadable += 1
            continue
        if content not in known:
            known.add(content)
            new.append(_New(sample, content, about))
    if unreadable:
        log.warning("review: %d new images cannot be read and are skipped", unreadable)
    if unnamed:
        log.warning("review: %d new images are skipped, as their names are not UTF-8; rename them", unnamed)
    return new


def _embedded(
    model: EmbeddingModel,
    folder: Path,
    manifest: Manifest,
    samples: Sequence[Sample],
    new: Sequence[_New],
    stop: Stop,
) -> tuple[np.ndarray, list[bool]]:
    """Return (embeddings float32 (K, D), whether each of the samples and new images has one). folder: of the store."""
    store = FeatureStore(folder, model.key, model.record)
    options = Options(device="auto" if torch.cuda.is_available() else "cpu")
    names = [_names(manifest, sample) for sample in samples]
    done = embed(model, samples, names, store, source_name(manifest.source), options, stop)
    keys = list(done.keys)
    failed = done.failed
    if new:
        others = [one.sample for one in new]
        further = embed(model, others, [()] * len(others), store, f"review of {manifest.source}", options, stop)
        keys += further.keys
        failed = failed | further.failed
    if failed:
        path, reason = next(iter(failed.items()))
        log.warning("review: images without an embedding are skipped: %d, such as %s: %s", len(failed), path, reason)
    known = [key for key in keys if key is not None]
    vectors = store.vectors(known) if known else np.zeros((0, 1), np.float32)
    return vectors, [key is not None for key in keys]


def _splits(sources: Sources, samples: Sequence[Sample]) -> dict[int, str]:
    """Return item → its split in the run that `sources.splits` is of."""
    if sources.splits is None:
        return {}
    rows = load_manifest(str(sources.splits), to_train=False).samples
    split_of = {absolute(row.path) if row.data is None else row.path: row.split for row in rows}
    splits = {}
    for index, sample in enumerate(samples):
        name = absolute(sample.path) if sample.data is None else sample.path
        if name in split_of:
            splits[index] = split_of[name]
    return splits


def _predicted(
    bundle: Bundle | None, fresh: Sequence[Item], vectors: np.ndarray, part: Part, manifest: Manifest, choice: str
) -> Predictions:
    """Predict the new items: by the bundle, else by a head that is fitted on the data set."""
    if bundle is not None and (predictions := _of_bundle(bundle, fresh, "predictions of new images")) is not None:
        return predictions
    indices = tuple(item.index for item in fresh)
    if not fresh:
        return Predictions(tuple(manifest.labels), indices, np.zeros((0, len(manifest.labels)), np.float32))
    rows = predict(choice, part, vectors, multilabel=manifest.task == "multilabel")
    return Predictions(tuple(manifest.labels), indices, rows)


def _of_bundle(bundle: Bundle | None, items: Sequence[Item], title: str) -> Predictions | None:
    """Predict the items by a bundle, None without one. An item that cannot be scored is absent."""
    if bundle is None or not items:
        return None
    info = bundle.info
    inputs = [SampleInput(partial(item.sample.read), item.sample.text, item.sample.has_image) for item in items]
    outcomes = score(
        bundle.classifier(), preprocess_of(info), inputs, task=info.task, temperature=info.temperature
    )  # fmt: skip
    pairs = [
        (item.index, row)
        for item, row in zip(items, tracked(outcomes, title, len(items), unit="images"), strict=True)
        if isinstance(row, np.ndarray)
    ]
    if not pairs:
        return None
    return Predictions(info.labels, tuple(index for index, _ in pairs), np.stack([row for _, row in pairs]))


def _described(data: ReviewData) -> tuple[Item, ...]:
    """Return the items with their predictions, and the new ones with their familiarity."""
    items = list(data.items)
    known = Predictions(data.labels, tuple(range(data.labelled)), data.out_of_fold)
    for index in np.flatnonzero(~np.isnan(data.out_of_fold).any(axis=1)).tolist():
        items[index] = replace(items[index], predictions=known.most_probable(index, SHOWN))
    if len(items) > data.labelled:
        fresh = list(range(data.labelled, len(items)))
        reference = np.random.default_rng(0).permutation(data.labelled)[:REFERENCE]
        values = familiarities(data.distances(fresh), data.distances(reference.tolist()))
        for index, value in zip(fresh, values.tolist(), strict=True):
            items[index] = replace(items[index], familiarity=round(float(value), 4))
    for row, index in enumerate(data.predicted.items):
        items[index] = replace(items[index], predictions=data.predicted.most_probable(row, SHOWN))
    return tuple(items)
