"""Run scorers as processes of this machine. A killed process is replaced, and its shards are scored again."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Protocol, TypeVar

from refract.errors import RefractError, ServiceError
from refract.pipeline.processes import STOPS, worker_context
from refract.pipeline.stopping import Stop, Stopped

log = logging.getLogger(__name__)

AHEAD = 2
"""Shards assigned to a scorer: the current one and the next one."""

TRIES = 3
"""Number of scorer deaths with a shard assigned after which the scoring fails."""


class ScoringError(ServiceError):
    """The scoring cannot continue; finished parts are kept. The message states the cause and the next step."""


class Shard(Protocol):
    """Consecutive rows. rows: each has a `path`, for messages."""

    @property
    def number(self) -> int: ...

    @property
    def start(self) -> int: ...

    @property
    def rows(self) -> Sequence[Any]: ...


class Done(Protocol):
    """The report of a finished shard."""

    @property
    def number(self) -> int: ...


D = TypeVar("D", bound=Done)
D_co = TypeVar("D_co", bound=Done, covariant=True)
S = TypeVar("S", bound=Shard)


class Job(Protocol[D_co]):
    """What a worker process does; a frozen dataclass with the field `device`, which can be pickled."""

    def worker(self) -> Callable[[Iterable[Any]], Iterator[D_co]]:
        """Prepare the work, in the worker process. Returns a function: shards → the report of each."""


class _Scorer(Generic[S, D]):
    """A worker process and the shards assigned to it."""

    def __init__(self, job: Job[D], *, first: bool = True) -> None:
        self.job, self.first = job, first
        self.shards: deque[S] = deque()
        context = worker_context(type(job).__module__)
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_work, args=(child_pipe, job), daemon=True)
        self.process.start()
        child_pipe.close()

    def assign(self, shard: S) -> None:
        self.shards.append(shard)
        with suppress(OSError):  # the process has just died, which the next receive detects
            self.pipe.send(shard)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def score_in_processes(shards: Sequence[S], job: Job[D], devices: Sequence[str], stop: Stop) -> Iterator[D | None]:
    """Yield Done for each written shard as it finishes, and None for each initial scorer that is ready.

    devices: one per process. Raises Stopped after a stop signal, and ScoringError where a scorer fails or TRIES scorers died with the same
    shard.
    """
    fresh, retries, tries = deque(shards), deque[S](), Counter[int]()
    scorers: list[_Scorer[S, D]] = [_Scorer(replace(job, device=device)) for device in devices]  # type: ignore[type-var]
    try:
        while True:
            for scorer in scorers:
                # Near the end each scorer gets one shard, so that no shard waits behind another scorer's current one.
                _assign(scorer, fresh, retries, tries, AHEAD if len(fresh) > len(scorers) else 1)
            busy = [scorer for scorer in scorers if scorer.shards]
            if not busy:
                return
            wait([scorer.pipe for scorer in busy], timeout=0.2)  # a pipe is also readable when its process has died
            if stop.signal is not None:
                raise Stopped(stop.signal)
            for index, scorer in enumerate(scorers):
                if scorer in busy and scorer.pipe.poll():
                    try:
                        message = scorer.pipe.recv()
                    except (EOFError, ConnectionResetError):
                        retries.extend(_lost_shards(scorer, tries))
                        scorers[index] = _Scorer(scorer.job, first=False)
                        continue
                    if (done := _received(scorer, message)) is not None or scorer.first:
                        yield done
    finally:
        for scorer in scorers:
            scorer.end()


def _assign(scorer: _Scorer[S, D], fresh: deque[S], retries: deque[S], tries: Counter[int], ahead: int) -> None:
    """Assign up to `ahead` shards. A shard of a dead scorer is assigned alone, so that the next death identifies its cause."""
    if retries and not scorer.shards:
        scorer.assign(retries.popleft())
    while fresh and len(scorer.shards) < ahead and not any(shard.number in tries for shard in scorer.shards):
        scorer.assign(fresh.popleft())


def _received(scorer: _Scorer[S, D], message: D | str | None) -> D | None:
    if isinstance(message, str):
        raise ScoringError(message)
    if message is not None:
        shard = scorer.shards.popleft()
        assert shard.number == message.number
    return message


def _lost_shards(scorer: _Scorer[S, D], tries: Counter[int]) -> list[S]:
    """Return the shards of a dead scorer and count its death. Raises ScoringError after TRIES deaths with one shard."""
    scorer.end()
    code = scorer.process.exitcode or 0
    cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    for shard in scorer.shards:
        tries[shard.number] += 1
        if tries[shard.number] >= TRIES:
            last = shard.start + len(shard.rows) - 1
            raise ScoringError(
                f"a worker process {cause}{hint}, {TRIES} times at the rows {shard.start} to {last}, which start with "
                f"{shard.rows[0].path or 'a text'}. Finished parts are kept. If memory ran out, lower --jobs or --batch-size; "
                "otherwise remove those rows"
            )
    log.warning("a worker process %s%s; a new process scores its rows again", cause, hint)
    return list(scorer.shards)


def _work(pipe: Connection, job: Job[Any]) -> None:
    """Run the worker process. It sends None when it is ready, Done for each written part, and a message if it fails."""
    # A fork server of another library may have started with both unblocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        scorer = job.worker()
        pipe.send(None)
        while True:
            first = pipe.recv()
            for done in scorer(_available(first, pipe)):
                pipe.send(done)
    except (EOFError, ConnectionError):  # the parent has closed the pipe or died
        return
    except Exception as error:
        pipe.send(failure_message(error))


def _available(first: S, pipe: Connection) -> Iterator[S]:
    """Yield the shards that have arrived. Waiting for more would delay the predictions of these."""
    yield first
    while pipe.poll():
        yield pipe.recv()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def failure_message(error: Exception) -> str:
    """Describe a scorer's failure for the user."""
    if isinstance(error, OSError):
        return (
            f"{error.filename or 'a part file'}: {error.strerror or error}. Finished parts are kept; "
            "run the same command again to resume"
        )
    if isinstance(error, RefractError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "a batch does not fit into the device's memory; use a smaller --batch-size. Finished parts are kept"
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1]
    location = f"{os.path.basename(last.filename)}, line {last.lineno}"  # noqa: PTH119
    return f"a worker process failed: {type(error).__name__}: {error} ({location}). Finished parts are kept"
