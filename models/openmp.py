"""Limit how long OpenMP's threads spin before they sleep. Imports no library, so that it can run before PyTorch loads OpenMP."""

import os

SPINS = "1000"
"""Iterations of GNU OpenMP's spin loop: some ten microseconds, about the duration of a small layer. The default of 300,000 takes
milliseconds, in which waiting threads occupy the cores that working threads need.

Measured with a small convolutional network, two threads, while other programs used both cores (40 steps): 3.8 s with 1,000, 9.2 s with
10,000, over a minute with the default, 3.1 s with one thread.
"""


def let_waiting_threads_sleep() -> None:
    """Shorten the spinning of GNU OpenMP in this process and its children.

    Call it before PyTorch is imported, because OpenMP reads the environment once. OMP_WAIT_POLICY or GOMP_SPINCOUNT in the environment
    takes precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
