"""Start worker processes that share one import of their modules."""

import multiprocessing
from typing import Any


def worker_context(module: str) -> Any:
    """Return a multiprocessing context that starts workers from a clean server process, not as forks of this one.

    A fork copies the locks of OpenCV's and OpenMP's threads, but not the threads, and then waits forever. module: what the server imports
    once for all workers, such as PyTorch with it.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context
