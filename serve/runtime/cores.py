"""Count the CPU cores that this process may use."""

import math
import os
from pathlib import Path


def cores() -> int:
    """Return the number of cores that this process may use: those of its affinity mask, at most the container's quota."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, quota() or available)


def quota(control_group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the container's CPU quota in cores, rounded up; None without a quota. Reads cgroup v2, which Docker and Kubernetes use."""
    try:
        allowed, period = (control_group / "cpu.max").read_text("ascii").split()
        return max(1, math.ceil(int(allowed) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None
