"""How long OpenMP's threads wait for work before they sleep. Imports nothing, so that it can run before PyTorch loads OpenMP."""

import os

SPINS = "1000"
"""Rounds of GNU OpenMP's waiting loop: some ten microseconds, about as long as a small layer takes. Its default of 300,000 is
milliseconds, in which waiting threads hold the cores that the working threads need.

Measured with a small convolutional network, two threads, while other programs used both cores (40 steps): 3.8 s with 1,000, 9.2 s with
10,000, over a minute with the default, 3.1 s with one thread.
"""


def let_waiting_threads_sleep() -> None:
    """Shorten the busy waiting of GNU OpenMP in this process and its children. Call it before PyTorch is imported: OpenMP reads the
    environment once. OMP_WAIT_POLICY or GOMP_SPINCOUNT in the environment wins."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
