"""A DataLoader that raises LoaderError within seconds of a worker's death, where PyTorch's loader can wait forever.

It relies on PyTorch's private iterator. `tests/pipeline/test_pipeline_loader.py` kills workers, and so detects a release that changes it.
"""

import atexit
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

from refract.errors import RefractError, ServiceError
from refract.pipeline.data.datasets import NOT_SENT, Item, collate

log = logging.getLogger(__name__)

SHARED = "/dev/shm"
PREFETCH = 2
"""Batches that each worker loads ahead."""
SPARE = 2
"""Batches outside the queue: the network's current batch and the next one."""
MOST_WORKERS = 8
"""Worker processes that `data.workers: null` starts at most."""
SEMAPHORES = 64 << 10
"""Upper bound of the shared memory of a loader's queues and locks, in bytes per worker."""
PATIENCE_S = 2.0
"""Seconds in which the watching thread must notice a worker's death after a failed read."""


class LoaderError(ServiceError):
    """Raised when a worker process died; the message names the cause and the setting to change."""


class _InPipe:
    """A tensor that is unpickled from the message itself, not from shared memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.array = tensor.numpy()

    def __reduce__(self) -> tuple[Callable[..., torch.Tensor], tuple[Any]]:
        return torch.from_numpy, (self.array,)


def collate_in_worker(items: Sequence[Item], *, stack: Callable[[Sequence[Item]], Item], shared: bool) -> Item:
    """Return the stacked items in shared memory, or, if none is free, in a form that is sent through the pipe.

    The batch is moved here and not in the queue's thread: an error in that thread loses the batch, and training waits for it forever.
    """
    return {name: _movable(tensor, shared) for name, tensor in stack(items).items()}


def _movable(tensor: torch.Tensor, shared: bool) -> Any:
    if shared:
        try:
            return tensor.share_memory_()
        except (RuntimeError, OSError):  # /dev/shm is full
            pass
    return _InPipe(tensor)


class Loader(DataLoader[Item]):
    """PyTorch's DataLoader. Raises LoaderError, and ends all workers, if one dies or cannot start."""

    def __init__(
        self,
        dataset: Any,
        *,
        workers: int,
        shared: bool = True,
        stack: Callable[[Sequence[Item]], Item] = collate,
        **options: Any,
    ) -> None:
        """shared: transfer batches in shared memory, not through pipes. stack: items → batch."""
        joined = partial(collate_in_worker, stack=stack, shared=shared) if workers else stack
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
                f"{SHARED} is full, so {self.num_workers} loader workers cannot start; enlarge it for a container "
                "(docker run --shm-size 2g), or set --data.workers 0"
            ) from error


class _Watch:
    """Watch the workers: after the first death, kill the others, so that no read waits for them. `first`: index of the dead worker."""

    def __init__(self, iterator: "_Watched") -> None:
        self.workers = list(iterator._workers)
        self.first: int | None = None
        # A pinning thread reads the pipe and would print a traceback at its end; PyTorch then watches the workers itself.
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
            self._writer.close()  # no writer remains, so a read that waits for the rest of a message fails


class _Watched(_MultiProcessingDataLoaderIter):
    """PyTorch's iterator over worker processes, with a `_Watch`."""

    _watch: _Watch | None = None

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        if first_iter:
            self._watch = _Watch(self)
            _iterators.add(self)
        with self._explained():
            super()._reset(loader, first_iter)

    def _next_data(self) -> Any:
        with self._explained():
            return super()._next_data()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise LoaderError instead of the error that a worker's death causes in a read."""
        try:
            yield
        except RefractError as error:  # an error in a worker, whose message PyTorch replaces by a traceback
            raise _own_message(error) from error
        except (RuntimeError, OSError, EOFError) as error:
            watch = self._watch
            if watch is None:
                raise
            watch.thread.join(PATIENCE_S)  # a connection breaks before the process counts as dead
            if watch.first is None:
                raise
            raise LoaderError(exit_message(watch.workers[watch.first].exitcode, len(watch.workers))) from error

    def _shutdown_workers(self) -> None:
        if self._watch is not None and self._watch.first is not None:  # the dead worker may hold the locks
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


def _own_message(error: RefractError) -> RefractError:
    """Return the error of a worker with its message alone."""
    kind = type(error)
    _, mark, message = str(error).rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")
    return kind(message.rstrip()) if mark else error


_iterators: "weakref.WeakSet[_Watched]" = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """End the workers of iterators that still exist at exit: Python would send them SIGTERM, which they ignore, and wait forever."""
    for iterator in tuple(_iterators):
        iterator._shutdown_workers()


def exit_message(code: int | None, workers: int) -> str:
    """Return a message on how a worker ended and what to change. code: `multiprocessing.Process.exitcode`; workers: their number."""
    if code == NOT_SENT:
        return (
            "a loader worker could not transfer a batch, probably because too many files are open; "
            "raise the limit (ulimit -n 65536), or set --data.workers 0"
        )
    if code is None or code >= 0:
        return f"a loader worker ended with exit code {code}; --data.workers 0 shows the error"
    name = signal.Signals(-code).name
    if code == -signal.SIGKILL:
        return (
            f"a loader worker was killed ({name}), probably because memory ran out; reduce --data.workers "
            f"(now {workers}) or --data.batch_size"
        )
    if code == -signal.SIGBUS:
        return (
            f"a loader worker died of {name}, probably because {SHARED} is full; enlarge it for a container "
            "(docker run --shm-size 2g), or set --data.workers 0"
        )
    return f"a loader worker crashed ({name}); --data.workers 0 loads in the training process and shows where"


def shared_memory_free() -> int | None:
    """Return the free shared memory in bytes for each rank on this machine, or None if the system has no shared memory folder."""
    try:
        state = os.statvfs(SHARED)
    except OSError:
        return None
    return state.f_bavail * state.f_frsize // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # torchrun's


def plan_workers(workers: int, batch_bytes: int, free: int | None) -> tuple[int, bool]:
    """Return (workers to start, whether they transfer batches in shared memory), as the free shared memory allows. Logs a change.

    batch_bytes: size of the largest batch. The choice does not change the batches.
    """
    need = batch_bytes * (PREFETCH * workers + SPARE) + workers * SEMAPHORES
    if not workers or free is None or free >= need:
        return workers, True
    remedy = f"docker run --shm-size {-(-need // (1 << 30))}g is enough for a container"
    if free < workers * SEMAPHORES:
        log.warning("%s has %s free; the training process loads the images itself; %s", SHARED, _size(free), remedy)
        return 0, True
    log.warning(
        "%s has %s free, %d workers need %s; batches use slower pipes; %s",
        SHARED, _size(free), workers, _size(need), remedy,
    )  # fmt: skip
    return workers, False


def _size(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"
