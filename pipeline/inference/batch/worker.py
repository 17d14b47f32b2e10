"""A scorer: shards in, part files out. It runs in a separate process, a local one or a Ray actor, and is independent of either."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import pyarrow as pa
import torch

from refract.models.allocator import keep_freed_memory
from refract.models.bundle.bundle import BundleError, load_bundle
from refract.models.familiarity import Familiarity
from refract.pipeline.data import storage
from refract.pipeline.inference.batch.listing import Row, Shard
from refract.pipeline.inference.batch.part_files import write_part
from refract.pipeline.inference.batch.rows import schema_of, table_of
from refract.pipeline.inference.scoring import SampleInput, Scored, preprocess_of, problem_of, score_outputs
from refract.plugins import LoadedPlugins


@dataclass(frozen=True)
class Job:
    """The job of a scorer.

    bundle, folder: absolute paths; digest: the digest of the bundle; key: the key of the work folder's record; about: description of the
    scoring for the file's metadata; root: folder to which the rows' paths are relative; texts, truths: whether the rows have them; device:
    `cpu` or `cuda:N`; threads: for the network, and as many for decoding; embeddings: whether the file gets a column of embeddings;
    plugins: those that the command has loaded.
    """

    bundle: Path
    digest: str
    folder: Path
    key: str
    about: dict[str, Any]
    root: str
    texts: bool
    truths: bool
    batch_size: int
    tta: str
    device: str
    threads: int
    embeddings: bool = False
    plugins: LoadedPlugins = field(default_factory=LoadedPlugins)

    def worker(self) -> Scorer:
        """Load the bundle, in the process that scores."""
        return Scorer(self)


class Done(NamedTuple):
    """A shard whose part file is written. rows, errors: number of its rows, and of those with an error."""

    number: int
    rows: int
    errors: int


class Scorer:
    """Scores shards and writes their part files."""

    def __init__(self, job: Job) -> None:
        """Load the bundle. Raises BundleError if it has changed since the scoring started."""
        keep_freed_memory()
        torch.set_num_threads(job.threads)
        cv2.setNumThreads(1)  # images are decoded in parallel
        bundle = load_bundle(job.bundle)
        if bundle.digest != job.digest:
            raise BundleError(
                f"{job.bundle}: the bundle changed while it was scoring; run the same command again to see the options"
            )
        self.job, self.info = job, bundle.info
        self.classifier, self.preprocess = bundle.classifier(job.device), preprocess_of(bundle.info)
        training = bundle.training_features()
        self.familiarity = None if training is None else Familiarity(training, torch.device("cpu"))
        self.schema = schema_of(
            self.info,
            texts=job.texts,
            truths=job.truths,
            embeddings=job.embeddings,
            familiarity=training is not None,
            key=job.key,
            about=job.about,
        )
        pa.array([])  # imports pandas if it is installed, which would delay the first part by half a second

    def __call__(self, shards: Iterable[Shard]) -> Iterator[Done]:
        """Write each shard's part file. Batches span shards, so that the network does not wait between them."""
        started: deque[Shard] = deque()

        def samples() -> Iterator[SampleInput]:
            for shard in shards:
                started.append(shard)
                yield from map(self._sample, shard.rows)

        info, job = self.info, self.job
        outcomes = score_outputs(
            self.classifier, self.preprocess, samples(), embed=job.embeddings,
            familiarity=self.familiarity, task=info.task, temperature=info.temperature,
            batch_size=job.batch_size, tta=job.tta, threads=job.threads,
        )  # fmt: skip
        answers: list[Scored | str] = []
        for outcome in outcomes:
            answers.append(self._answer(started[0].rows[len(answers)], outcome))
            if len(answers) == len(started[0].rows):
                shard = started.popleft()
                write_part(job.folder, job.key, shard.number, table_of(shard, answers, info, self.schema))
                yield Done(shard.number, len(answers), sum(isinstance(answer, str) for answer in answers))
                answers = []

    def _sample(self, row: Row) -> SampleInput:
        path = row.path or ""
        if not storage.scheme_of(path):
            path = os.path.join(self.job.root, path)  # noqa: PTH118 — faster than Path for millions of rows
        return SampleInput(lambda: _bytes(path), row.text or "", row.path is not None)

    def _answer(self, row: Row, outcome: Scored | Exception) -> Scored | str:
        """Return the outputs of the row, or the error message."""
        problem = problem_of(outcome, self.classifier.reads, row.path is not None, row.text or "")
        return outcome if problem is None and isinstance(outcome, Scored) else str(problem)


def _bytes(path: str) -> bytes:
    try:
        return storage.read(path)
    except ValueError as error:  # the path has a zero byte
        raise OSError(str(error)) from error
