"""How many cores there are for this process."""

import math
import os
from pathlib import Path


def cores() -> int:
    """Those that it may run on, or as many as its container's quota pays for, where these are fewer."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(own, quota() or own)


def quota(control_group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Cores that a container's quota pays for, rounded up; None without one. Of cgroup v2, as Docker and Kubernetes use it."""
    try:
        paid, period = (control_group / "cpu.max").read_text("ascii").split()
        return max(1, math.ceil(int(paid) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None
