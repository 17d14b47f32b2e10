"""Scorers as processes of this machine: each is handed shards; one that is killed is replaced, and what it had in hand is scored again."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from refract.pipeline.inference.batch.listing import Shard
from refract.pipeline.training.callbacks.stopping import Stop, Stopped

if TYPE_CHECKING:
    from refract.pipeline.inference.batch.worker import Done, Job

log = logging.getLogger(__name__)

AHEAD = 2
"""Shards in a scorer's hands: the one that it scores, and the one that it goes on with."""

TRIES = 3
"""How often a shard may end its scorer."""


class ScoringError(RuntimeError):
    """The scoring cannot go on; what is done is kept. The message says why and what to do."""


class _Scorer:
    """A process, and the shards in its hands."""

    def __init__(self, job: "Job", *, first: bool = True) -> None:
        self.job, self.first = job, first
        self.shards: deque[Shard] = deque()
        context = multiprocessing.get_context(
            "spawn"
        )  # a fork takes along the locks of OpenCV's threads, not the threads
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, job), daemon=True)
        # A terminal's Ctrl-C and a supervisor's SIGTERM reach all processes; this one decides for them. A child keeps what is blocked.
        resource_tracker.ensure_running()  # which, where it begins, unblocks what is blocked
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        other.close()

    def give(self, shard: Shard) -> None:
        self.shards.append(shard)
        with suppress(OSError):  # it has just died, which is seen when it is listened to
            self.pipe.send(shard)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def score_in_processes(
    shards: Sequence[Shard], job: "Job", devices: Sequence[str], stop: Stop
) -> Iterator["Done | None"]:
    """For each shard that is written what it was, as they end; None when one of the first scorers is ready. devices: one a process.

    Stopped where `stop` heard a signal; ScoringError where a scorer failed, or a shard ended its scorer TRIES times.
    """
    fresh, again, tries = deque(shards), deque[Shard](), Counter[int]()
    scorers = [_Scorer(replace(job, device=device)) for device in devices]
    try:
        while True:
            for scorer in scorers:
                # At the end each takes one, that none waits for another's second.
                _hand_out(scorer, fresh, again, tries, AHEAD if len(fresh) > len(scorers) else 1)
            busy = [scorer for scorer in scorers if scorer.shards]
            if not busy:
                return
            wait([scorer.pipe for scorer in busy], timeout=0.2)  # the end of a process ends its pipe too
            if stop.signal is not None:
                raise Stopped(stop.signal)
            for place, scorer in enumerate(scorers):
                if scorer in busy and scorer.pipe.poll():
                    try:
                        message = scorer.pipe.recv()
                    except (EOFError, ConnectionResetError):
                        again.extend(_lost(scorer, tries))
                        scorers[place] = _Scorer(scorer.job, first=False)
                        continue
                    if (done := _heard(scorer, message)) is not None or scorer.first:
                        yield done
    finally:
        for scorer in scorers:
            scorer.end()


def _hand_out(scorer: _Scorer, fresh: deque[Shard], again: deque[Shard], tries: Counter[int], ahead: int) -> None:
    """A shard that was in hand when a scorer died is given alone: the next death tells whether it was this one."""
    if again and not scorer.shards:
        scorer.give(again.popleft())
    while fresh and len(scorer.shards) < ahead and not any(shard.number in tries for shard in scorer.shards):
        scorer.give(fresh.popleft())


def _heard(scorer: _Scorer, message: Any) -> "Done | None":
    if isinstance(message, str):
        raise ScoringError(message)
    if message is not None:
        shard = scorer.shards.popleft()
        assert shard.number == message.number
    return message


def _lost(scorer: _Scorer, tries: Counter[int]) -> list[Shard]:
    """What the dead process had in hand."""
    scorer.end()
    code = scorer.process.exitcode or 0
    why = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended by itself with code {code}"
    hint = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
    for shard in scorer.shards:
        tries[shard.number] += 1
        if tries[shard.number] >= TRIES:
            last = shard.start + len(shard.rows) - 1
            raise ScoringError(
                f"a process {why}{hint}, {TRIES} times with the rows {shard.start} to {last} in hand, which begin with "
                f"{shard.rows[0].path or 'a text'}. What is done is kept. Where it is memory, fewer --jobs or a smaller --batch-size take "
                "less; else leave those rows out"
            )
    log.warning("a process %s%s; another one takes its place and its rows", why, hint)
    return list(scorer.shards)


def _work(pipe: Connection, job: "Job") -> None:
    """The process. It sends None when it is ready, Done for each part that is written, and a text where it cannot go on."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        from refract.pipeline.inference.batch.worker import Scorer

        scorer = Scorer(job)
        pipe.send(None)
        while True:
            first = pipe.recv()
            for done in scorer(_at_hand(first, pipe)):
                pipe.send(done)
    except (EOFError, ConnectionError):  # of the pipe: the command has ended
        return
    except Exception as error:
        pipe.send(told(error))


def _at_hand(first: Shard, pipe: Connection) -> Iterator[Shard]:
    """The shards that are here already: to wait for another would keep back the answers of those."""
    yield first
    while pipe.poll():
        yield pipe.recv()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def told(error: Exception) -> str:
    """A scorer's failure for its user."""
    if isinstance(error, OSError):
        return f"{error.filename or 'a part file'}: {error.strerror or error}. What is done is kept; the same command goes on"
    if type(error).__name__ in ("BundleError", "DataError"):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "the device's memory does not hold a batch; a smaller --batch-size does with less. What is done is kept"
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(last.filename)}, line {last.lineno}"  # noqa: PTH119
    return f"a process failed: {type(error).__name__}: {error} ({place}). What is done is kept"
