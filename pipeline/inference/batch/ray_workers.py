"""Run scorers as actors of Ray Data, on this machine or on the cluster that RAY_ADDRESS names.

Each row of the Ray data set is a shard, whose part file an actor writes. Ray repeats the shards of a lost node. All nodes must see the
bundle, the images and the output under the same paths.
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
from refract.pipeline.inference.batch.local_workers import ScoringError, failure_message
from refract.pipeline.inference.batch.worker import Done, Job, Scorer
from refract.pipeline.stopping import Stop, Stopped

log = logging.getLogger(__name__)

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no usage reports to Ray's developers
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 leaves its workers no time on a busy machine: a start took over six minutes
}


class _Actor:
    """The actor that Ray calls with shards. It returns failures as messages, because Ray would show an exception as a traceback."""

    def __init__(self, job: Job) -> None:
        self.scorer: Scorer | None = None
        self.failure = ""
        try:
            self.scorer = Scorer(job)
        except Exception as error:
            self.failure = failure_message(error)

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
                failure = failure_message(error)
        done += [Done(shard.number, 0, 0) for shard in shards[len(done) :]]
        return {
            "number": [part.number for part in done],
            "rows": [part.rows for part in done],
            "errors": [part.errors for part in done],
            "failure": [failure] * len(done),
        }


def score_on_ray(shards: Sequence[Shard], job: Job, jobs: int | None, device: str, stop: Stop) -> Iterator[Done | None]:
    """Score as `refract.pipeline.inference.batch.local_workers.score_in_processes`, with Ray actors.

    jobs: number of actors, None for one per GPU or core of the cluster. Raises DataError if Ray is not installed, ScoringError if it fails.
    """
    if find_spec("ray") is None:
        raise DataError("--engine ray: Ray is not installed; run pip install 'refract[ray]', or omit --engine")
    os.environ.update(QUIET)
    import ray

    starts_ray = not ray.is_initialized()
    try:
        if starts_ray:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        stop.install()  # Ray has replaced the handler for SIGTERM
        yield None
        yield from _received(_results(shards, job, *_resources(jobs, device, len(shards))), stop)
    except (ray.exceptions.RayError, ConnectionError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ScoringError(
            f"Ray failed: {reason}. Finished parts are kept; run the same command again to resume"
        ) from error
    finally:
        if starts_ray:
            ray.shutdown()


def _resources(jobs: int | None, device: str, shards: int) -> tuple[int, int, str]:
    """Return (number of actors, cores per actor, their device)."""
    import ray

    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0)) if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise DataError("--device: cuda, but Ray sees no GPU; use auto or cpu")
    count = max(1, min(jobs or gpus or cpus, gpus or cpus, shards))
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return count, cores_of_actor(nodes, count), "cuda" if gpus else "cpu"


def cores_of_actor(nodes: Sequence[int], actors: int) -> int:
    """Return the most cores for each of `actors` actors, none of which spans two nodes. nodes: cores of each node."""
    fits = (cores for cores in range(max(nodes, default=1), 1, -1) if sum(n // cores for n in nodes) >= actors)
    return next(fits, 1)


def _results(shards: Sequence[Shard], job: Job, actors: int, cores: int, device: str) -> Iterator[dict[str, Any]]:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    items = [
        {"number": shard.number, "start": shard.start, "rows": [list(row) for row in shard.rows]} for shard in shards
    ]
    # One block per shard, so that Ray repeats single shards after the loss of a node.
    results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Actor, batch_size=1, batch_format="numpy", compute=ray.data.ActorPoolStrategy(size=actors),
        fn_constructor_args=(replace(job, threads=cores, device=device),), num_cpus=cores, num_gpus=1 if device == "cuda" else 0,
    )  # fmt: skip
    yield from results.iter_rows()


def _received(results: Iterator[dict[str, Any]], stop: Stop) -> Iterator[Done | None]:
    """Yield the results, which a thread reads, because Ray handles no signals while it waits."""
    received: queue.SimpleQueue[dict[str, Any] | Exception | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for row in results:
                received.put(row)
            received.put(None)
        except Exception as error:
            received.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        if stop.signal is not None:
            raise Stopped(stop.signal)
        try:
            row = received.get(timeout=0.2)
        except queue.Empty:
            continue
        if row is None:
            return
        if isinstance(row, Exception):
            raise row
        if row["failure"]:
            raise ScoringError(str(row["failure"]))
        yield Done(int(row["number"]), int(row["rows"]), int(row["errors"]))
