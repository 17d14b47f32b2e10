"""Compute the embeddings of samples that a store lacks, on all cores or GPUs."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from refract.augment import Augmenter, ImageError
from refract.models.head import head_inputs
from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data.manifest import DataError, Sample
from refract.pipeline.features import worker
from refract.pipeline.features.model import EmbeddingModel
from refract.pipeline.features.store import PLAIN, FeatureStore, Key, StoredSample, View, content_of
from refract.pipeline.files import read_file
from refract.pipeline.inference.batch_scoring import choose_devices, cores
from refract.pipeline.training.callbacks.stopping import Stop, Stopped
from refract.progress import Progress

log = logging.getLogger(__name__)

SHARD_SIZE = 512
"""Embeddings in a file: a killed process repeats at most this many."""

WORTH_A_PROCESS = 30.0
"""Seconds of remaining work in this process from which further processes pay, as their start takes seconds."""


@dataclass
class Embedded:
    """keys: of each sample's plain embedding, None where it failed; computed: number of embeddings that the store lacked;
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


def embed(
    model: EmbeddingModel,
    samples: Sequence[Sample],
    labels: Sequence[tuple[str, ...]],
    store: FeatureStore,
    source: str,
    options: Options,
    stop: Stop,
) -> Embedded:
    """Make sure that the store holds the embedding of each sample, and list the samples under `source`.

    labels: class names of each sample. Each distinct content is computed once. Raises Stopped after a stop signal, DataError or
    ScoringError where a worker fails; finished shards stay in the store.
    """
    result = Embedded()
    contents = _contents(samples, model.classifier.tokens is not None, result.failed)
    stored = [
        StoredSample(content or "", sample.path, names, sample.split, sample.text)
        for content, sample, names in zip(contents, samples, labels, strict=True)
    ]
    store.refresh()
    wanted = _wanted(samples, stored, options)
    missing = [row for row in wanted.values() if row.key not in store]
    result.reused = len(wanted) - len(missing)
    if missing:
        with Progress("embedding", len(wanted), unit="embeddings", count=result.reused) as progress:
            for done in _computed(missing, model, store, options, stop):
                if done is not None:
                    progress.update(done.rows + len(done.failed))
                    result.computed += done.rows
                    result.failed |= done.failed
        store.refresh()
    keys = [Key(content) if content else None for content in contents]
    result.keys = [key if key is not None and key in store else None for key in keys]
    whole = [row for row, key in zip(stored, result.keys, strict=True) if key is not None]
    store.add_samples(source, whole)
    return result


def _contents(samples: Sequence[Sample], texts: bool, failed: dict[str, str]) -> list[str | None]:
    """Hash the content of each sample, None for a file that cannot be read."""

    def hashed(sample: Sample) -> str | OSError:
        try:
            return content_of(sample.read() if sample.has_image else b"", trimmed(sample.text) if texts else "")
        except OSError as error:
            return error

    contents: list[str | None] = []
    with ThreadPoolExecutor(cores()) as pool:
        for sample, content in zip(samples, pool.map(hashed, samples), strict=True):
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
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _computed(
    missing: Sequence[worker.Row], model: EmbeddingModel, store: FeatureStore, options: Options, stop: Stop
) -> Iterator[worker.Done | None]:
    shards = [
        worker.Shard(number, start, tuple(missing[start : start + SHARD_SIZE]))
        for number, start in enumerate(range(0, len(missing), SHARD_SIZE))
    ]
    devices = choose_devices(options.device, options.jobs, len(shards))
    job = worker.Job(
        worker.pickled(model.classifier, model.preprocess, options.augmenter), store.folder.resolve(), options.batch_size,
        devices[0], max(1, cores() // len(devices)),
    )  # fmt: skip
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
    if len(devices) > 1:
        from refract.pipeline.inference.batch.local_workers import score_in_processes

        yield from score_in_processes(shards, job, devices, stop)
        return
    yield from _stoppable(
        worker.Embedder(model.classifier, model.preprocess, options.augmenter, job)(iter(shards)), stop
    )


def _stoppable(done: Iterator[worker.Done], stop: Stop) -> Iterator[worker.Done]:
    for shard in done:
        yield shard
        if stop.signal is not None:
            raise Stopped(stop.signal)


def source_name(source: str) -> str:
    """Return the name of a source in the store: its absolute path, or the name of an embedded data set."""
    return str(Path(source).resolve()) if os.path.exists(source) else source  # noqa: PTH110


def embed_images(model: EmbeddingModel, files: Sequence[Path]) -> np.ndarray:
    """Return the embeddings of image files, float32 (N, D), without a store. DataError names a file that cannot be read."""
    vectors = []
    with head_inputs(model.classifier.network) as batches:
        for file in files:
            try:
                image = model.preprocess(read_file(file))
            except (OSError, ImageError) as error:
                raise DataError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
            with torch.inference_mode():
                model.classifier(torch.from_numpy(image).permute(2, 0, 1)[None])
            vectors.append(batches.pop().numpy()[0])
    return np.stack(vectors)
