"""Start worker processes that share one import of their modules."""

import multiprocessing
import signal
from typing import Any

STOPS = {signal.SIGINT, signal.SIGTERM}
"""The signals by which a terminal and a supervisor stop all processes of a command. Its main process decides when the workers end."""


def worker_context(module: str) -> Any:
    """Return a multiprocessing context that starts workers from a clean server process, not as forks of this one.

    A fork copies the locks of OpenCV's and OpenMP's threads, but not the threads, and then waits forever. module: what the server imports
    once for all workers, such as PyTorch with it. The server and its workers start with STOPS blocked, as a signal would end the server and
    with it the workers.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    resource_tracker.ensure_running()  # its start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
