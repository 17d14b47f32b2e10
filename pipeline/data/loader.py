"""The loader whose worker processes may die: training then ends with one sentence within seconds, where PyTorch's own can wait forever.

It relies on PyTorch's private iterator. `tests/pipeline/test_pipeline_loader.py` kills workers, so a release that changes it is noticed.
"""

import errno
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from refract.pipeline.data.datasets import NOT_SENT, Item, collate

log = logging.getLogger(__name__)

SHARED = "/dev/shm"
PREFETCH = 2
"""Batches that each worker loads ahead."""
SPARE = 2
"""Batches outside the queue: the one that the network computes and the next one."""
SEMAPHORES = 64 << 10
"""Bytes of shared memory that a loader's queues and locks take at most, for each worker."""
PATIENCE_S = 2.0
"""For the watching thread to notice a death, after a read failed."""


class LoaderError(RuntimeError):
    """A worker process died; the message says how, and what to change."""


class _InPipe:
    """A tensor that is unpickled from the message itself, not from shared memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.array = tensor.numpy()

    def __reduce__(self) -> tuple[Callable[..., torch.Tensor], tuple[Any]]:
        return torch.from_numpy, (self.array,)


def collate_in_worker(items: Sequence[Item], *, shared: bool) -> dict[str, Any]:
    """Return `collate` of the items in shared memory, or where there is none left, to be sent through the pipe.

    Moving a batch here and not in the queue's own thread matters: an error there loses the batch, and training waits for it forever.
    """
    return {name: _movable(tensor, shared) for name, tensor in collate(items).items()}


def _movable(tensor: torch.Tensor, shared: bool) -> Any:
    if shared:
        try:
            return tensor.share_memory_()
        except (RuntimeError, OSError):  # /dev/shm is full by now
            pass
    return _InPipe(tensor)


class Loader(DataLoader[Item]):
    """PyTorch's loader of `collate`d batches. LoaderError where a worker died or could not start; the other workers end then, too."""

    def __init__(self, dataset: Any, *, workers: int, shared: bool = True, **options: Any) -> None:
        """shared: hand batches over in shared memory, not through pipes."""
        joined = partial(collate_in_worker, shared=shared) if workers else collate
        ahead = PREFETCH if workers else None
        super().__init__(dataset, num_workers=workers, collate_fn=joined, prefetch_factor=ahead, **options)

    def _get_iterator(self) -> _BaseDataLoaderIter:
        if not self.num_workers:
            return super()._get_iterator()
        try:
            return _Watched(self)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise LoaderError(
                f"{SHARED} is full, so {self.num_workers} loader workers cannot start; give a container more "
                "(docker run --shm-size 2g), or take --data.workers 0"
            ) from error


class _Watch:
    """Notices the first death of a worker, ends the others, and with them whatever waits for them. `first`: its index in `workers`."""

    def __init__(self, iterator: "_Watched") -> None:
        self.workers = list(iterator._workers)
        self.first: int | None = None
        # Where a thread pins memory, it reads from the pipe; its end would be a traceback, and PyTorch looks after the workers by itself.
        results: Any = iterator._worker_result_queue
        self._writer = None if iterator._pin_memory else results._writer
        self.thread = threading.Thread(target=self._run, args=[weakref.ref(iterator)], name="workers", daemon=True)
        self.thread.start()

    def _run(self, iterator: "weakref.ref[_Watched]") -> None:
        sentinels = [worker.sentinel for worker in self.workers]
        ready = wait(sentinels)
        alive = iterator()
        if alive is None or alive._shutdown:
            return
        self.first = sentinels.index(ready[0])  # type: ignore[arg-type]
        for worker in self.workers:
            worker.kill()
        if self._writer is not None:
            self._writer.close()  # no process can write any more: a read that waits for the rest of a message ends


class _Watched(_MultiProcessingDataLoaderIter):
    """PyTorch's iterator over worker processes, with a `_Watch`."""

    _watch: _Watch | None = None

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        if first_iter:
            self._watch = _Watch(self)
        with self._explained():
            super()._reset(loader, first_iter)

    def _next_data(self) -> Any:
        with self._explained():
            return super()._next_data()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise LoaderError in place of the error that a worker's death causes in a read."""
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            watch = self._watch
            if watch is None:
                raise
            watch.thread.join(PATIENCE_S)  # a connection breaks before the process counts as dead
            if watch.first is None:
                raise
            raise LoaderError(death(watch.workers[watch.first].exitcode, len(watch.workers))) from error

    def _shutdown_workers(self) -> None:
        if self._watch is not None and self._watch.first is not None:  # the locks may be those of the dead
            self._shutdown = True
            for queue in self._index_queues:
                queue.cancel_join_thread()
            if hasattr(self, "_pin_memory_thread_done_event"):
                self._pin_memory_thread_done_event.set()
            return
        super()._shutdown_workers()
        for worker in getattr(self, "_workers", ()):
            if worker.is_alive():
                worker.kill()  # workers ignore SIGTERM


def death(code: int | None, workers: int) -> str:
    """Say how a worker ended and what to change. code: as `multiprocessing.Process.exitcode`; workers: how many there were."""
    if code == NOT_SENT:
        return (
            "a loader worker could not hand a batch over, as where too many files are open; "
            "raise the limit (ulimit -n 65536), or take --data.workers 0"
        )
    if code is None or code >= 0:
        return f"a loader worker ended by itself with exit code {code}; --data.workers 0 shows why"
    name = signal.Signals(-code).name
    if code == -signal.SIGKILL:
        return (
            f"a loader worker was killed ({name}), as the system does where memory runs out; take fewer --data.workers "
            f"(now {workers}) or a smaller --data.batch_size"
        )
    if code == -signal.SIGBUS:
        return (
            f"a loader worker was ended by {name}, as where {SHARED} is full; give a container more "
            "(docker run --shm-size 2g), or take --data.workers 0"
        )
    return f"a loader worker crashed ({name}); --data.workers 0 shows where, in the training process"


def shared_memory_free() -> int | None:
    """Bytes of shared memory that are free for each of this machine's training processes, None where the system has no folder for it."""
    try:
        state = os.statvfs(SHARED)
    except OSError:
        return None
    return state.f_bavail * state.f_frsize // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # torchrun's


def hand_over(workers: int, batch_bytes: int, free: int | None) -> tuple[int, bool]:
    """(workers to start, whether they hand batches over in shared memory), as the free shared memory allows. Logs what it changes.

    batch_bytes: of the largest batch. Results are the same either way.
    """
    need = batch_bytes * (PREFETCH * workers + SPARE) + workers * SEMAPHORES
    if not workers or free is None or free >= need:
        return workers, True
    cure = f"docker run --shm-size {-(-need // (1 << 30))}g gives a container enough"
    if free < workers * SEMAPHORES:
        log.warning("%s has %s free; the training process loads the images itself; %s", SHARED, _size(free), cure)
        return 0, True
    log.warning(
        "%s has %s free, %d workers need %s; batches go through pipes, more slowly; %s",
        SHARED, _size(free), workers, _size(need), cure,
    )  # fmt: skip
    return workers, False


def _size(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"
