"""Compute the embeddings of samples that a store lacks, on all cores or GPUs."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refract.augment import Augmenter
from refract.augment.resize_libraries import REFRACT
from refract.cores import cores, mapped
from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data import storage
from refract.pipeline.data.manifest import DataError, Sample
from refract.pipeline.features import worker
from refract.pipeline.features.model import EmbeddingModel
from refract.pipeline.features.store import PLAIN, FeatureStore, Key, StoredSample, View, content_of
from refract.pipeline.inference.batch_scoring import choose_devices
from refract.pipeline.inference.scoring import SampleInput, Scored, score_outputs
from refract.pipeline.stopping import Stop, Stopped
from refract.plugins import loaded
from refract.progress import Progress

log = logging.getLogger(__name__)

SHARD_SIZE = 512
"""Embeddings in a file: a killed process repeats at most this many."""

WORTH_A_PROCESS = 30.0
"""Seconds of remaining work in this process from which further processes pay, as their start takes seconds."""


@dataclass
class Embedded:
    """keys: the keys of each sample's plain embedding, None where it failed; computed: number of embeddings that the store lacked;
    reused: number of those that it had; failed: path → reason.
    """

    keys: list[Key | None] = field(default_factory=list)
    computed: int = 0
    reused: int = 0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """device: auto, cpu or cuda; jobs: number of processes, None for one per GPU or core where it pays; epochs: number of augmented views
    of each sample, by `augmenter`, besides the plain embedding.
    """

    device: str = "auto"
    jobs: int | None = None
    batch_size: int = 64
    augmenter: Augmenter | None = None
    epochs: int = 0


class Stored(NamedTuple):
    """A model and its part of a feature store, from which commands take embeddings. device: auto, cpu or cuda, for those it lacks."""

    model: EmbeddingModel
    store: FeatureStore
    device: str = "auto"

    def embedded(self, samples: Sequence[Sample]) -> Embedded:
        """Make sure that the store holds the embedding of each sample, without listing the samples. Errors: see `embed`."""
        options = Options(device=self.device)
        return embed(self.model, samples, [()] * len(samples), self.store, None, options, Stop("now"))


def embed(
    model: EmbeddingModel,
    samples: Sequence[Sample],
    labels: Sequence[tuple[str, ...]],
    store: FeatureStore,
    source: str | None,
    options: Options,
    stop: Stop,
    *,
    first: int | None = None,
) -> Embedded:
    """Make sure that the store holds the embedding of each sample, and list the samples under `source`, unless it is None.

    labels: class names of each sample. first: embed only so many samples; the others are listed if the store has their embeddings.
    Each distinct content is computed once. Raises Stopped after a stop signal, DataError or ScoringError where a worker fails; finished
    shards stay in the store.
    """
    result = Embedded()
    contents = _contents(samples, model.classifier.reads, result.failed)
    stored = [
        StoredSample(content or "", sample.path, names, sample.split, sample.text)
        for content, sample, names in zip(contents, samples, labels, strict=True)
    ]
    store.refresh()
    wanted = _wanted(samples[:first], stored[:first], options)
    missing = [row for row in wanted.values() if row.key not in store]
    result.reused = len(wanted) - len(missing)
    if missing:
        with Progress("embedding", len(wanted), unit="embeddings", count=result.reused) as progress:
            for done in _computed(missing, model, store, options, stop):
                if done is not None:
                    progress.update(done.total)
                    result.computed += done.rows
                    result.failed |= done.failed
        store.refresh()
    keys = [Key(content) if content else None for content in contents]
    result.keys = [key if key is not None and key in store else None for key in keys]
    if source is not None:
        whole = [row for row, key in zip(stored, result.keys, strict=True) if key is not None]
        store.add_samples(source, whole)
    return result


def _contents(samples: Sequence[Sample], reads: frozenset[str], failed: dict[str, str]) -> list[str | None]:
    """Hash the content of each sample, None for a file that cannot be read and for a sample without what the model reads."""

    def hashed(sample: Sample) -> str | OSError:
        image, text = sample.has_image and "images" in reads, trimmed(sample.text) if "texts" in reads else ""
        if not image and not text:
            return OSError(f"has no {' and no '.join(name[:-1] for name in sorted(reads))}, which the model reads")
        try:
            return content_of(sample.read() if image else b"", text)
        except OSError as error:
            return error

    contents: list[str | None] = []
    for sample, content in zip(samples, mapped(hashed, samples), strict=True):
        if isinstance(content, OSError):
            failed[sample.path] = content.strerror or str(content)
            contents.append(None)
        else:
            contents.append(content)
    return contents


def _wanted(samples: Sequence[Sample], stored: Sequence[StoredSample], options: Options) -> dict[Key, worker.Row]:
    """Return one row for each distinct embedding: the plain ones, then each epoch's views."""
    views = [(PLAIN, -1)]
    if options.augmenter is not None:
        policy = policy_digest(options.augmenter)
        views += [(View(policy, epoch), epoch) for epoch in range(options.epochs)]
    rows: dict[Key, worker.Row] = {}
    for view, epoch in views:
        for index, (sample, row) in enumerate(zip(samples, stored, strict=True)):
            if row.content:
                key = Key(row.content, view if epoch < 0 else view._replace(sample=index))
                rows.setdefault(key, worker.Row(sample.path, key, sample, row))
    return rows


def policy_digest(augmenter: Augmenter) -> str:
    """Return the SHA-256 of all that a view depends on besides the image, the epoch and the index, in hexadecimal."""
    facts = [augmenter.policy.to_spec(), augmenter.seed, augmenter.size, augmenter.color_profile]
    if augmenter.interpolation != REFRACT:  # else the digests of stored views would change
        facts.append(augmenter.interpolation)
    facts += sorted(plugin.sha256 for plugin in loaded())  # which may have the code of the policy's ops
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _computed(
    missing: Sequence[worker.Row], model: EmbeddingModel, store: FeatureStore, options: Options, stop: Stop
) -> Iterator[worker.Done | None]:
    shards = [
        worker.Shard(number, start, tuple(missing[start : start + SHARD_SIZE]))
        for number, start in enumerate(range(0, len(missing), SHARD_SIZE))
    ]
    devices = choose_devices(options.device, options.jobs, len(shards))
    threads = max(1, cores() // len(devices))
    job = worker.Job(b"", store.folder.resolve(), options.batch_size, devices[0], threads)
    if options.jobs is None and len(devices) > 1:  # the first shard shows whether further processes pay
        embedder = worker.Embedder(model.classifier, model.preprocess, options.augmenter, replace(job, threads=cores()))
        while shards:
            started = time.perf_counter()
            yield from _stoppable(embedder(iter(shards[:1])), stop)
            shards = shards[1:]
            if (time.perf_counter() - started) * len(shards) > WORTH_A_PROCESS:
                break
    if not shards:
        return
    pickled = worker.pickled(model.classifier, model.preprocess, options.augmenter) if len(devices) > 1 else b""
    if pickled:
        from refract.pipeline.inference.batch.local_workers import score_in_processes

        yield from score_in_processes(shards, replace(job, model=pickled), devices, stop)
        return
    embedder = worker.Embedder(model.classifier, model.preprocess, options.augmenter, replace(job, threads=cores()))
    yield from _stoppable(embedder(iter(shards)), stop)


def _stoppable(done: Iterator[worker.Done], stop: Stop) -> Iterator[worker.Done]:
    for shard in done:
        yield shard
        if stop.signal is not None:
            raise Stopped(stop.signal)


def source_name(source: str) -> str:
    """Return the name of a source in the store: its absolute path, or the name of an embedded data set."""
    return str(Path(source).resolve()) if os.path.exists(source) else source  # noqa: PTH110


def embed_images(model: EmbeddingModel, files: Sequence[Path]) -> np.ndarray:
    """Return the embeddings of image files, also in archives, without texts, float32 (N, D), without a store.

    DataError names a file that cannot be read or embedded, and for a model that reads no images.
    """
    if "images" not in model.classifier.reads:
        raise DataError(f"{files[0]}: the model reads only texts; expected a model that reads images")
    inputs = [SampleInput(partial(storage.read, str(file))) for file in files]
    vectors = []
    outcomes = score_outputs(model.classifier, model.preprocess, inputs, embed=True, task="multilabel", threads=1)
    for file, outcome in zip(files, outcomes, strict=True):
        if not isinstance(outcome, Scored):
            raise DataError(f"{file}: {getattr(outcome, 'strerror', None) or outcome}") from outcome
        if outcome.embedding is None or not np.isfinite(outcome.embedding).all():
            raise DataError(f"{file}: the network's features are not finite")
        vectors.append(outcome.embedding)
    return np.stack(vectors)
