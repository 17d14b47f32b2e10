"""Scorers as actors of Ray Data, on this machine or on the cluster that RAY_ADDRESS names.

A row of Ray's is a shard, of which the actor writes the part; Ray makes anew what a lost node had in hand. All nodes see the bundle, the
images and the output under the same paths.
"""

import logging
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from refract.pipeline.data.manifest import DataError
from refract.pipeline.inference.batch.listing import Row, Shard
from refract.pipeline.inference.batch.local_workers import ScoringError, told
from refract.pipeline.inference.batch.worker import Done, Job, Scorer
from refract.pipeline.training.callbacks.stopping import Stop, Stopped

log = logging.getLogger(__name__)

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # else it tells Ray's makers what runs here
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class _Actor:
    """What Ray calls: shards in, what was written out. It says what failed instead of raising, which Ray would tell as a traceback."""

    def __init__(self, job: Job) -> None:
        self.scorer: Scorer | None = None
        self.failure = ""
        try:
            self.scorer = Scorer(job)
        except Exception as error:
            self.failure = told(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        shards = [
            Shard(int(number), int(start), tuple(Row(*row) for row in rows))
            for number, start, rows in zip(batch["number"], batch["start"], batch["rows"], strict=True)
        ]
        done: list[Done] = []
        failure = self.failure
        if self.scorer is not None:
            try:
                done = list(self.scorer(shards))
            except Exception as error:
                failure = told(error)
        done += [Done(shard.number, 0, 0) for shard in shards[len(done) :]]
        return {
            "number": [part.number for part in done],
            "rows": [part.rows for part in done],
            "errors": [part.errors for part in done],
            "failure": [failure] * len(done),
        }


def score_on_ray(shards: Sequence[Shard], job: Job, jobs: int | None, device: str, stop: Stop) -> Iterator[Done | None]:
    """As `refract.pipeline.inference.batch.local_workers.score_in_processes`; jobs: actors, None for one a GPU or
    core of the cluster. DataError where Ray is not installed; ScoringError where it fails."""
    if find_spec("ray") is None:
        raise DataError("--engine ray: Ray is not installed; pip install refract[ray], or leave the option out")
    os.environ.update(QUIET)
    import ray

    began = not ray.is_initialized()
    try:
        if began:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        stop.listen()  # Ray has put its own handler for SIGTERM in place
        yield None
        yield from _heard(_results(shards, job, *_share(jobs, device, len(shards))), stop)
    except (ray.exceptions.RayError, ConnectionError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ScoringError(f"Ray failed: {reason}. What is done is kept; the same command goes on") from error
    finally:
        if began:
            ray.shutdown()


def _share(jobs: int | None, device: str, shards: int) -> tuple[int, int, str]:
    """(actors, cores of each, their device)."""
    import ray

    there = ray.cluster_resources()
    cpus, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0)) if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise DataError("--device: cuda, but Ray sees no GPU; take auto or cpu")
    count = min(jobs or gpus or cpus, gpus or cpus, shards)
    return max(1, count), max(1, cpus // max(1, count)), "cuda" if gpus else "cpu"


def _results(shards: Sequence[Shard], job: Job, actors: int, cores: int, device: str) -> Iterator[dict[str, Any]]:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    items = [
        {"number": shard.number, "start": shard.start, "rows": [list(row) for row in shard.rows]} for shard in shards
    ]
    # As many blocks as shards, that one which is scored again after a loss is a shard alone.
    answered = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Actor, batch_size=1, batch_format="numpy", compute=ray.data.ActorPoolStrategy(size=actors),
        fn_constructor_args=(replace(job, threads=cores, device=device),), num_cpus=cores, num_gpus=1 if device == "cuda" else 0,
    )  # fmt: skip
    yield from answered.iter_rows()


def _heard(results: Iterator[dict[str, Any]], stop: Stop) -> Iterator[Done | None]:
    """The results, read by a thread, as Ray hears no signal while it waits."""
    found: queue.SimpleQueue[dict[str, Any] | Exception | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for row in results:
                found.put(row)
            found.put(None)
        except Exception as error:
            found.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        if stop.signal is not None:
            raise Stopped(stop.signal)
        try:
            row = found.get(timeout=0.2)
        except queue.Empty:
            continue
        if row is None:
            return
        if isinstance(row, Exception):
            raise row
        if row["failure"]:
            raise ScoringError(str(row["failure"]))
        yield Done(int(row["number"]), int(row["rows"]), int(row["errors"]))
