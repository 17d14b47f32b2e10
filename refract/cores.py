"""Count the CPU cores that this process may use, and run work on them in threads."""

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sized
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

    It reads cgroup v2, which Docker, Kubernetes and systemd use.
    """
    try:
        name = next(line for line in process.read_text("utf-8").splitlines() if line.startswith("0::"))[3:]
    except (OSError, StopIteration):
        name = "/"
    group = Path(name.lstrip("/"))
    limits = [_quota(control_groups / folder / "cpu.max") for folder in (group, *group.parents)]
    return min((limit for limit in limits if limit is not None), default=None)


def _quota(file: Path) -> int | None:
    try:
        allowed, period = file.read_text("ascii").split()
        return max(1, math.ceil(int(allowed) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None


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
