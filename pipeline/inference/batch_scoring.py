"""`score_all`: the one linear story from a bundle and a listing to one Parquet file, that any end in between only interrupts."""

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from refract.models.bundle.bundle import Bundle, load_bundle
from refract.pipeline.data.manifest import DataError
from refract.pipeline.data.sources.folders import label_of
from refract.pipeline.files import locked
from refract.pipeline.inference.batch import part_files
from refract.pipeline.inference.batch.listing import Listing, Shard, listing_of
from refract.pipeline.inference.batch.rows import schema_of
from refract.pipeline.inference.batch.worker import Done, Job
from refract.pipeline.training.callbacks.stopping import Stop, Stopped, heard

log = logging.getLogger(__name__)

SHARD_SIZE = 512
TELL_EVERY = 30.0
"""Seconds between lines of progress where there is no terminal for a bar."""


@dataclass(frozen=True)
class Options:
    """jobs: processes, None chooses; shard_size: rows of a part, None for that of the parts that are there, else SHARD_SIZE; device:
    auto, cpu or cuda; engine: processes or ray."""

    jobs: int | None = None
    batch_size: int = 64
    shard_size: int | None = None
    tta: str = "none"
    device: str = "auto"
    engine: str = "processes"
    overwrite: bool = False
    restart: bool = False


@dataclass
class Summary:
    """rows, errors: in the file; scored: rows in this go; seconds: from when the processes were ready, in the mean, until the file was
    there; start_seconds: before; labelled, right: rows with a truth and an answer, and those whose label it is, for multi-label all
    labels; overlap: for multi-label the sum over these rows of the F1 of the given labels, None for one label a row."""

    rows: int = 0
    errors: int = 0
    scored: int = 0
    seconds: float = 0.0
    start_seconds: float = 0.0
    labelled: int = 0
    right: int = 0
    overlap: float | None = None
    reasons: dict[str, int] = field(default_factory=dict)

    def look(self, table: Any) -> None:
        """Count a part's rows."""
        self.rows += len(table)
        for reason in table["error"].drop_null().to_pylist():
            self.errors += 1
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if "truth" not in table.column_names:
            return
        several = "labels" in table.column_names
        given = table["labels" if several else "label"].to_pylist()
        for answer, truth in zip(given, table["truth"].to_pylist(), strict=True):
            if answer is not None and truth and truth.strip():
                self.labelled += 1
                if several:
                    self._compare(
                        set(map(label_of, answer)), {part.strip() for part in truth.split(";") if part.strip()}
                    )
                else:
                    self.right += label_of(answer) == truth.strip()

    def _compare(self, given: set[str], truth: set[str]) -> None:
        self.right += given == truth
        both = len(given) + len(truth)
        self.overlap = (self.overlap or 0.0) + (2 * len(given & truth) / both if both else 1.0)


def score_all(bundle: Path, source: Path, out: Path, options: Options) -> Summary:
    """Score every row of `source` and write `out`. DataError, BundleError; ScoringError; Stopped after SIGTERM or Ctrl-C."""
    begun = time.perf_counter()
    folder = part_files.folder_of(out)
    if out.is_dir():
        raise DataError(f"-o: {out} is a folder; name a file, as {out / 'scores.parquet'}")
    if out.exists() and not options.overwrite and not folder.exists():
        raise _exists(out)
    opened, listing = load_bundle(bundle), listing_of(source)
    record = _record(opened, listing, options, folder)
    key = part_files.key_of(record)
    folder.mkdir(parents=True, exist_ok=True)
    busy = DataError(f"{out} is being written by another process")
    summary = Summary()
    with locked(folder / "lock", busy):
        if not folder.exists():  # the other one has just finished
            raise busy
        if out.exists() and not options.overwrite:
            return _finished(out, folder, key, summary)
        part_files.begin(folder, record, restart=options.restart)
        with heard("at once; what is done is kept") as stop:
            job = job_of(opened, listing, options, folder.resolve(), key)
            shards = list(listing.shards(record["shard_size"]))
            files = {shard.number: part_files.part_of(folder, key, shard.number) for shard in shards}
            missing = [shard for shard in shards if not part_files.is_whole(files[shard.number], len(shard.rows))]
            schema = schema_of(opened.info, texts=listing.texts, truths=listing.truths, key=key, about=job.about)
            ready = _score(missing, job, options, stop, summary, len(listing.rows)) if missing else time.perf_counter()

            def look(table: Any) -> None:
                if stop.signal is not None:
                    raise Stopped(stop.signal)
                summary.look(table)

            part_files.assemble(folder, files.values(), out, schema, rows=len(listing.rows), look=look)
        part_files.remove(folder)
    summary.start_seconds, summary.seconds = ready - begun, time.perf_counter() - ready
    return summary


def _record(bundle: Bundle, listing: Listing, options: Options, folder: Path) -> dict[str, Any]:
    """All that the parts' rows depend on. The batch size, the processes and the engine are not of it."""
    before = part_files.read_record(folder)
    kept = before.get("shard_size") if before and not options.restart else None
    size = options.shard_size or (kept if isinstance(kept, int) and kept > 0 else SHARD_SIZE)
    return {"bundle": bundle.digest, "listing": listing.digest(), "shard_size": size, "tta": options.tta}


def job_of(bundle: Bundle, listing: Listing, options: Options, folder: Path, key: str) -> Job:
    info = bundle.info
    about: dict[str, Any] = {
        "refract": version("refract"),
        "bundle": bundle.digest,
        "name": info.name,
        "created": info.created,
    }
    about |= {"task": info.task, "labels": list(info.labels), "temperature": info.temperature, "tta": options.tta}
    return Job(
        bundle.path.resolve(), bundle.digest, folder, key, {**about, "source": listing.source}, listing.root, listing.texts,
        listing.truths, options.batch_size, options.tta, "cpu", 1,
    )  # fmt: skip


def _score(missing: list[Shard], job: Job, options: Options, stop: Stop, summary: Summary, total: int) -> float:
    """Fill the missing parts, and show how far it is. Returns when the processes were ready, in the mean."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    summary.scored = sum(len(shard.rows) for shard in missing)
    there = total - summary.scored
    if there:
        log.info("going on: %s of %s rows are there", f"{there:,}", f"{total:,}")
    ready: list[float] = []
    told = time.perf_counter()
    with (
        logging_redirect_tqdm(),
        tqdm(total=total, initial=there, unit=" rows", disable=None, leave=False, smoothing=0.05) as bar,
    ):
        for done in _engine(missing, job, options, stop):
            if done is None:
                ready.append(time.perf_counter())
                continue
            bar.update(done.rows)
            there += done.rows
            if bar.disable and time.perf_counter() - told > TELL_EVERY:
                log.info("%s of %s rows", f"{there:,}", f"{total:,}")
                told = time.perf_counter()
    return fmean(ready) if ready else told


def _engine(missing: list[Shard], job: Job, options: Options, stop: Stop) -> Iterator[Done | None]:
    if options.engine == "ray":
        from refract.pipeline.inference.batch.ray_workers import score_on_ray

        return score_on_ray(missing, job, options.jobs, options.device, stop)
    from refract.pipeline.inference.batch.local_workers import score_in_processes

    devices = choose_devices(options.device, options.jobs, len(missing))
    threads = max(1, cores() // len(devices))
    return score_in_processes(missing, replace(job, threads=threads), devices, stop)


def choose_devices(device: str, jobs: int | None, shards: int) -> list[str]:
    """The device of each process: one a GPU, or one a core, but not more than there are shards. DataError for a GPU that is not there."""
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise DataError("--device: cuda, but PyTorch sees no GPU here; take auto or cpu")
    count = min(jobs or gpus or cores(), max(1, shards))
    return [f"cuda:{place % gpus}" if gpus else "cpu" for place in range(count)]


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _exists(out: Path) -> DataError:
    return DataError(f"{out} exists already; --overwrite replaces it when the new one is whole")


def _finished(out: Path, folder: Path, key: str, summary: Summary) -> Summary:
    """The file is there, and so is its work folder: it was whole, and only the tidying was cut off. DataError where it is another file."""
    if part_files.key_in(out) != key:
        raise _exists(out)
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(out) as file:
        for batch in file.iter_batches():
            summary.look(pa.Table.from_batches([batch]))
    part_files.remove(folder)
    return summary
