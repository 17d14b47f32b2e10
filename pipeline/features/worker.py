"""Compute shards of embeddings, in this process or in a worker process."""

import logging
import pickle
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from refract.augment import Augmenter, Preprocess
from refract.models.classifier import Classifier
from refract.models.multimodal.tokens import trimmed
from refract.pipeline.data.manifest import Sample
from refract.pipeline.features.store import LARGEST, PLAIN, Key, StoredSample, content_of, write_vectors
from refract.pipeline.inference.scoring import SampleInput, Scored, score_outputs
from refract.plugins import LoadedPlugins

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """An embedding to compute. path: the path of the sample, for messages."""

    path: str
    key: Key
    sample: Sample
    stored: StoredSample


class Shard(NamedTuple):
    """Rows whose embeddings form one file. start: index of the first row among all."""

    number: int
    start: int
    rows: tuple[Row, ...]


class Done(NamedTuple):
    """A shard whose file is written. rows: number of its embeddings; total: number of its rows; failed: path → why its sample has no
    embedding, one entry for all views of the sample."""

    number: int
    rows: int
    total: int
    failed: dict[str, str]


@dataclass(frozen=True)
class Job:
    """The job of an embedder.

    model: pickled by `pickled`, empty for an embedder in the same process; folder: the folder of the model in the store; threads: for the
    network, and as many for decoding.
    """

    model: bytes = field(repr=False)
    folder: Path
    batch_size: int
    device: str
    threads: int
    plugins: LoadedPlugins = field(default_factory=LoadedPlugins)

    def worker(self) -> "Embedder":
        """Build the model, in the process that embeds."""
        import cv2

        from refract.models.allocator import keep_freed_memory

        keep_freed_memory()
        torch.set_num_threads(self.threads)
        cv2.setNumThreads(1)  # images are decoded in parallel
        classifier, preprocess, augmenter = pickle.loads(self.model)  # from the parent process
        return Embedder(classifier, preprocess, augmenter, self)


def pickled(classifier: Classifier, preprocess: Preprocess, augmenter: Augmenter | None) -> bytes:
    """Encode a model for `Job`, with tensors on the CPU. Returns b"" for the network of a plugin that cannot be pickled.

    Plain bytes, because tensors in a message would need shared memory, of which a container has little.
    """
    device = next(classifier.parameters()).device
    try:
        return pickle.dumps((classifier.cpu(), preprocess, augmenter))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        log.warning("one process embeds, as the network cannot be sent to others: %s", error)
        return b""
    finally:
        classifier.to(device)


class Embedder:
    """Computes embeddings and writes shards."""

    def __init__(self, classifier: Classifier, preprocess: Preprocess, augmenter: Augmenter | None, job: Job) -> None:
        self.preprocess, self.augmenter, self.job = preprocess, augmenter, job
        channels_last = (
            torch.channels_last if all(p.ndim < 5 for p in classifier.parameters()) else torch.preserve_format
        )
        self.classifier = classifier.to(job.device).to(memory_format=channels_last).eval()

    def __call__(self, shards: Iterable[Shard]) -> Iterator[Done]:
        """Write each shard's file. Batches span shards, so that the network does not wait between them."""
        started: deque[Shard] = deque()

        def inputs() -> Iterator[SampleInput]:
            for shard in shards:
                started.append(shard)
                yield from map(self._input, shard.rows)

        vectors: list[np.ndarray] = []
        done: list[Row] = []
        failed: dict[str, str] = {}
        count = 0  # several views of a sample fail under one path
        outcomes = score_outputs(
            self.classifier, self.preprocess, inputs(), embed=True, task="multilabel", batch_size=self.job.batch_size,
            threads=self.job.threads,
        )  # fmt: skip
        for outcome in outcomes:
            shard = started[0]
            row = shard.rows[count]
            count += 1
            vector = outcome.embedding if isinstance(outcome, Scored) else None
            if vector is not None and (np.abs(vector) <= LARGEST).all():
                done.append(row)
                vectors.append(vector)
            else:
                failed[row.path] = _reason(outcome)
            if count == len(shard.rows):
                if done:
                    write_vectors(self.job.folder, [r.key for r in done], [r.stored for r in done], np.stack(vectors))
                yield Done(started.popleft().number, len(done), count, failed)
                vectors, done, failed, count = [], [], {}, 0

    def _input(self, row: Row) -> SampleInput:
        sample, view = row.sample, row.key.view
        prepare = None
        if view != PLAIN and self.augmenter is not None:
            prepare = partial(self.augmenter, epoch=view.epoch, index=view.sample)
        return SampleInput(partial(self._read, row), sample.text, sample.has_image, prepare)

    def _read(self, row: Row) -> bytes:
        """Read the image. OSError if its bytes are no longer those of the key, so that no embedding of other bytes is stored."""
        data = row.sample.read()
        text = trimmed(row.sample.text) if self.classifier.tokens is not None else ""
        if content_of(data, text) != row.key.content:
            raise OSError("the file changed while it was embedded; run the command again")
        return data


def _reason(outcome: object) -> str:
    if isinstance(outcome, Scored):
        return f"the network's features are not finite, or exceed the range of float16, ±{LARGEST:.0f}"
    return outcome.strerror if isinstance(outcome, OSError) and outcome.strerror else str(outcome)
