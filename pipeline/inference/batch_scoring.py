"""Score a folder or a manifest with a bundle into one Parquet file. An interrupted scoring resumes from its part files."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from refract.cores import cores
from refract.models.bundle.bundle import Bundle, load_bundle
from refract.pipeline.data.manifest import DataError
from refract.pipeline.data.sources.folders import label_of
from refract.pipeline.files import locked
from refract.pipeline.inference.batch import part_files
from refract.pipeline.inference.batch.listing import Listing, Shard, listing_of
from refract.pipeline.inference.batch.rows import schema_of
from refract.pipeline.inference.batch.worker import Done, Job
from refract.pipeline.stopping import Stop, Stopped, stop_requests
from refract.progress import Progress

log = logging.getLogger(__name__)

SHARD_SIZE = 512


@dataclass(frozen=True)
class Options:
    """The options of a scoring.

    jobs: number of processes, None to choose; shard_size: rows per part file, None for that of existing parts, else SHARD_SIZE; device:
    auto, cpu or cuda; engine: processes or ray; embeddings: add a column with the embeddings; overwrite: replace an existing file; restart:
    discard existing parts.
    """

    jobs: int | None = None
    batch_size: int = 64
    shard_size: int | None = None
    tta: str = "none"
    device: str = "auto"
    engine: str = "processes"
    embeddings: bool = False
    overwrite: bool = False
    restart: bool = False


@dataclass
class Summary:
    """The result of a scoring.

    rows, errors: rows in the file, and those with an error; scored: rows scored by this process; start_seconds: time until the workers
    were ready, on average; seconds: time from then until the file was complete; labelled: rows with a true label and a prediction; right:
    those whose prediction is the true label, for multi-label all labels; overlap: for multi-label the sum of these rows' F1 of predicted
    and true labels, otherwise None; reasons: error → number of rows.
    """

    rows: int = 0
    errors: int = 0
    scored: int = 0
    seconds: float = 0.0
    start_seconds: float = 0.0
    labelled: int = 0
    right: int = 0
    overlap: float | None = None
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, table: Any) -> None:
        """Add the rows of a part."""
        self.rows += len(table)
        for reason in table["error"].drop_null().to_pylist():
            self.errors += 1
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if "truth" not in table.column_names:
            return
        multilabel = "labels" in table.column_names
        predictions = table["labels" if multilabel else "label"].to_pylist()
        for prediction, truth in zip(predictions, table["truth"].to_pylist(), strict=True):
            if prediction is not None and truth and truth.strip():
                self.labelled += 1
                if multilabel:
                    true_labels = {label.strip() for label in truth.split(";") if label.strip()}
                    self._compare(set(map(label_of, prediction)), true_labels)
                else:
                    self.right += label_of(prediction) == truth.strip()

    def _compare(self, predicted: set[str], truth: set[str]) -> None:
        self.right += predicted == truth
        both = len(predicted) + len(truth)
        self.overlap = (self.overlap or 0.0) + (2 * len(predicted & truth) / both if both else 1.0)


def score_all(bundle: str | Path, source: str | Path, out: Path, options: Options) -> Summary:
    """Score every row of `source` and write `out`.

    Raises DataError or BundleError for unusable inputs, ScoringError where the workers fail, and Stopped after SIGTERM or Ctrl-C.
    """
    started = time.perf_counter()
    folder = part_files.folder_of(out)
    if out.is_dir():
        raise DataError(f"-o: {out} is a folder; name a file, such as {out / 'scores.parquet'}")
    if out.exists() and not options.overwrite and not folder.exists():
        raise _exists(out)
    loaded, listing = load_bundle(bundle), listing_of(source)
    record = _record(loaded, listing, options, folder)
    key = part_files.key_of(record)
    folder.mkdir(parents=True, exist_ok=True)
    busy = DataError(f"{out} is being written by another process; wait for it, or write to another file with -o")
    summary = Summary()
    with locked(folder / "lock", busy):
        if not folder.exists():  # the other process has just finished
            raise busy
        if out.exists() and not options.overwrite:
            return _finished(out, folder, key, summary)
        part_files.begin(folder, record, restart=options.restart)
        with stop_requests("in a moment; finished parts are kept") as stop:
            job = job_of(loaded, listing, options, folder.resolve(), key)
            shards = list(listing.shards(record["shard_size"]))
            files = {shard.number: part_files.part_of(folder, key, shard.number) for shard in shards}
            missing = [shard for shard in shards if not part_files.is_whole(files[shard.number], len(shard.rows))]
            schema = schema_of(
                loaded.info, texts=listing.texts, truths=listing.truths, embeddings=options.embeddings,
                familiarity=loaded.training_features() is not None, key=key, about=job.about
            )  # fmt: skip
            ready = _score(missing, job, options, stop, summary, len(listing.rows)) if missing else time.perf_counter()

            def visit(table: Any) -> None:
                if stop.signal is not None:
                    raise Stopped(stop.signal)
                summary.add(table)

            part_files.assemble(folder, files.values(), out, schema, rows=len(listing.rows), visit=visit)
        part_files.remove(folder)
    summary.start_seconds, summary.seconds = ready - started, time.perf_counter() - ready
    return summary


def _record(bundle: Bundle, listing: Listing, options: Options, folder: Path) -> dict[str, Any]:
    """Return all that the rows of the parts depend on, which excludes the batch size, the processes and the engine."""
    stored = part_files.read_record(folder)
    stored_size = stored.get("shard_size") if stored and not options.restart else None
    size = options.shard_size or (stored_size if isinstance(stored_size, int) and stored_size > 0 else SHARD_SIZE)
    record = {"bundle": bundle.digest, "listing": listing.digest(), "shard_size": size, "tta": options.tta}
    # Without embeddings the record is that of earlier versions, so that their scorings resume.
    return record | ({"embeddings": True} if options.embeddings else {})


def job_of(bundle: Bundle, listing: Listing, options: Options, folder: Path, key: str) -> Job:
    """Describe the job of the workers, on the CPU with one thread until the engine chooses."""
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
        listing.truths, options.batch_size, options.tta, "cpu", 1, options.embeddings,
    )  # fmt: skip


def _score(missing: list[Shard], job: Job, options: Options, stop: Stop, summary: Summary, total: int) -> float:
    """Score the missing parts and show the progress. Returns the mean time at which the workers were ready."""
    summary.scored = sum(len(shard.rows) for shard in missing)
    count = total - summary.scored
    if count:
        log.info("resuming: %s of %s rows are already scored", f"{count:,}", f"{total:,}")
    ready: list[float] = []
    start = time.perf_counter()
    with Progress("scoring", total, unit="rows", count=count) as progress:
        for done in _engine(missing, job, options, stop):
            if done is None:
                ready.append(time.perf_counter())
                continue
            progress.update(done.rows)
    return fmean(ready) if ready else start


def _engine(missing: list[Shard], job: Job, options: Options, stop: Stop) -> Iterator[Done | None]:
    if options.engine == "ray":
        from refract.pipeline.inference.batch.ray_workers import score_on_ray

        return score_on_ray(missing, job, options.jobs, options.device, stop)
    from refract.pipeline.inference.batch.local_workers import score_in_processes

    devices = choose_devices(options.device, options.jobs, len(missing))
    threads = max(1, cores() // len(devices))
    return score_in_processes(missing, replace(job, threads=threads), devices, stop)


def choose_devices(device: str, jobs: int | None, shards: int) -> list[str]:
    """Return the device of each process: one process per GPU or per core, at most one per shard.

    Raises DataError for `cuda` on a machine without a GPU.
    """
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise DataError("--device: cuda, but PyTorch sees no GPU on this machine; use auto or cpu")
    count = min(jobs or gpus or cores(), max(1, shards))
    return [f"cuda:{index % gpus}" if gpus else "cpu" for index in range(count)]


def _exists(out: Path) -> DataError:
    return DataError(f"{out} exists already; --overwrite replaces it once the new file is complete")


def _finished(out: Path, folder: Path, key: str, summary: Summary) -> Summary:
    """Handle a complete file whose work folder remains, because the clean-up was interrupted.

    Raises DataError if the file is that of another scoring.
    """
    if part_files.key_in(out) != key:
        raise _exists(out)
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(out) as file:
        for batch in file.iter_batches():
            summary.add(pa.Table.from_batches([batch]))
    part_files.remove(folder)
    return summary
