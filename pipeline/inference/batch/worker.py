"""One scorer: shards in, part files out. It runs in a process of its own, started here or by Ray, and knows neither."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import torch

from refract.models.allocator import keep_freed_memory
from refract.models.bundle.bundle import BundleError, load_bundle
from refract.models.multimodal.tokens import trimmed
from refract.pipeline.files import read_file
from refract.pipeline.inference.batch.listing import Row, Shard
from refract.pipeline.inference.batch.part_files import write_part
from refract.pipeline.inference.batch.rows import schema_of, table_of
from refract.pipeline.inference.scoring import SampleInput, preprocess_of, score


@dataclass(frozen=True)
class Job:
    """All that a scorer must know. bundle, folder: absolute; digest: of the bundle; key: of the work folder's record; root: what the rows'
    paths are relative to; device: `cpu` or `cuda:N`; threads: for the network, and as many for decoding."""

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


class Done(NamedTuple):
    """A shard whose part file is there."""

    number: int
    rows: int
    errors: int


class Scorer:
    def __init__(self, job: Job) -> None:
        """BundleError where the bundle is not the one that the scoring began with."""
        keep_freed_memory()
        torch.set_num_threads(job.threads)
        cv2.setNumThreads(1)  # images are decoded beside each other
        bundle = load_bundle(job.bundle)
        if bundle.digest != job.digest:
            raise BundleError(
                f"{job.bundle}: the bundle was exchanged while it scored; the same command tells what to do"
            )
        self.job, self.info = job, bundle.info
        self.classifier, self.preprocess = bundle.classifier(job.device), preprocess_of(bundle.info)
        self.schema = schema_of(self.info, texts=job.texts, truths=job.truths, key=job.key, about=job.about)
        pa.array([])  # imports pandas, where it is installed: half a second that the first part would take

    def __call__(self, shards: Iterable[Shard]) -> Iterator[Done]:
        """Write each shard's part. A batch goes on from one shard to the next, so that the network does not wait between them."""
        begun: deque[Shard] = deque()

        def questions() -> Iterator[SampleInput]:
            for shard in shards:
                begun.append(shard)
                yield from map(self._question, shard.rows)

        info, job = self.info, self.job
        answers = score(
            self.classifier, self.preprocess, questions(), task=info.task, temperature=info.temperature,
            batch_size=job.batch_size, tta=job.tta, threads=job.threads,
        )  # fmt: skip
        found: list[np.ndarray | str] = []
        for answer in answers:
            found.append(self._told(begun[0].rows[len(found)], answer))
            if len(found) == len(begun[0].rows):
                shard = begun.popleft()
                write_part(job.folder, job.key, shard.number, table_of(shard, found, info, self.schema))
                yield Done(shard.number, len(found), sum(isinstance(answer, str) for answer in found))
                found = []

    def _question(self, row: Row) -> SampleInput:
        path = os.path.join(self.job.root, row.path or "")  # noqa: PTH118 — for each of millions
        return SampleInput(lambda: _bytes(path), row.text or "", row.path is not None)

    def _told(self, row: Row, answer: np.ndarray | Exception) -> np.ndarray | str:
        """The answer, or the reason why there is none."""
        reads, text = self.classifier.reads, bool(trimmed(row.text or ""))
        if row.path is None and not text:
            return "neither an image nor a text"
        if row.path is None and "texts" not in reads:
            return "no image, and the bundle reads nothing else"
        if not text and "images" not in reads:
            return "no text, and the bundle reads nothing else"
        if isinstance(answer, np.ndarray):
            return answer if np.isfinite(answer).all() else "the network's answer is no number"
        return answer.strerror if isinstance(answer, OSError) and answer.strerror else str(answer)


def _bytes(path: str) -> bytes:
    try:
        return read_file(path)
    except ValueError as error:  # a name with a zero byte
        raise OSError(str(error)) from error
