"""Count the CPU cores that this process may use, and run work on them in threads."""

import math
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

TASK = 16
"""Items in one task of a thread. For small files the overhead of a task matters."""

AHEAD = 4
"""Tasks for each thread that wait or have a result that nobody took yet, which bounds the memory."""


def cores() -> int:
    """Return the number of cores that this process may use: those of its affinity mask, at most the container's quota."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, quota() or available)


def quota(control_groups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the smallest CPU quota of the process's control group and its parents, in cores, rounded up; None without a quota.

    It reads cgroup v2, and v1 on older hosts.
    """
    try:
        lines = process.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    folders = {Path(): None}  # a container sees its group as the root
    for line in lines:
        controllers, _, name = line.partition(":")[2].partition(":")
        if not controllers or "cpu" in controllers.split(","):
            group = Path(name.lstrip("/"))
            folders |= dict.fromkeys((group, *group.parents))
    limits = [limit for folder in folders for limit in _quotas(control_groups, folder)]
    return min(limits, default=None)


def _quotas(control_groups: Path, group: Path) -> Iterator[int]:
    """Yield the quotas of a control group, by cgroup v2 and by v1."""
    v1 = control_groups / "cpu" / group
    for files in ([control_groups / group / "cpu.max"], [v1 / "cpu.cfs_quota_us", v1 / "cpu.cfs_period_us"]):
        try:
            allowed, period = map(int, " ".join(file.read_text("ascii") for file in files).split())
            if allowed > 0:  # -1 is no limit
                yield max(1, math.ceil(allowed / period))
        except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
            continue


_limited: dict[str, str] = {}


def limit_threads(processes: int = 1) -> None:
    """Give OpenMP, BLAS and PyTorch as many threads as the CPU quota has cores. They ignore it and take one for each core of the machine.

    OpenMP and BLAS read the environment when they are imported. The user's `OMP_NUM_THREADS` takes precedence. processes: number of
    processes that compute at a time and share the quota.
    """
    stored = os.environ.get("OMP_NUM_THREADS")
    if quota() is None or (stored is not None and stored != _limited.get("OMP_NUM_THREADS")):
        return
    threads, torch = max(1, cores() // processes), sys.modules.get("torch")
    if torch is None or processes > 1:  # a program that has PyTorch keeps its environment
        os.environ["OMP_NUM_THREADS"] = _limited["OMP_NUM_THREADS"] = str(threads)
    if torch is not None:
        torch.set_num_threads(min(torch.get_num_threads(), threads))


def mapped(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int | None = None
) -> Generator[Result, None, None]:
    """Yield `work(item)` of each item, in order, computed by threads: one for each core by default.

    At most AHEAD · TASK items for each thread are taken ahead of the results, so that a million items need no more memory than a thousand.
    An error of `work` is raised in place of the result. Work that has not started is dropped when the iterator is closed.
    """
    count = threads or cores()
    size = TASK if not isinstance(items, Sized) else max(1, min(TASK, len(items) // (AHEAD * count)))
    source = iter(items)
    with ThreadPoolExecutor(count) as pool:
        waiting: deque[Future[list[Result]]] = deque()
        try:
            while True:
                while len(waiting) < AHEAD * count and (task := list(islice(source, size))):
                    waiting.append(pool.submit(_apply, work, task))
                if not waiting:
                    return
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _apply(work: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [work(item) for item in items]
