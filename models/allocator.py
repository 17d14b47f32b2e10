"""Configure glibc's malloc to reuse freed memory in processes that compute networks. Imports no heavy library.

By default malloc returns each large block to the system, so that the next layer causes page faults for fresh, zeroed pages. Training
allocates the same blocks at every step, so the process keeps them instead. The module has no effect without glibc.
"""

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8  # malloc.h
_LARGEST_INT = (1 << 31) - 1
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more
_SETTINGS = ("ARENA_MAX", "ARENA_TEST", "MMAP_MAX_", "MMAP_THRESHOLD_", "TOP_PAD_", "TRIM_THRESHOLD_")


def keep_freed_memory(at_most: int | None = None) -> bool:
    """Make this process reuse freed memory instead of returning it to the system. Returns whether it changed malloc's settings.

    Call it before the process starts threads: existing threads keep their arenas, which fragment memory. Afterwards the main thread and
    PyTorch's backward thread share one arena.

    at_most: bytes to keep, for a long-lived process or one of many; blocks above 32 MiB return to the system immediately. None is for a
    process that computes: it keeps blocks of any size, and at the heap's end at most a quarter of the available memory. If that quarter
    exceeds 2 GiB, malloc's largest limit, it keeps all memory until `release_freed_memory`, so never more than its peak.

    The user's settings take precedence: the function changes nothing if `MALLOC_…` variables or `GLIBC_TUNABLES` configure malloc, or
    `LD_PRELOAD` replaces it.
    """
    if not _is_glibc() or configured_by_user(os.environ) or not (quarter := available_memory() // 4):
        return False
    if at_most is not None:
        limit = min(at_most, quarter, _LARGEST_INT)
        settings = {_M_TRIM_THRESHOLD: limit, _M_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD}
    elif quarter <= _LARGEST_INT:
        # A trim keeps the pad. The pad uses address space, but no memory until the process writes to it.
        pad = {} if _address_space_is_limited() else {_M_TOP_PAD: quarter}
        settings = {_M_TRIM_THRESHOLD: quarter, _M_MMAP_MAX: 0} | pad
    else:
        settings = {_M_TRIM_THRESHOLD: -1, _M_MMAP_MAX: 0}
    mallopt = ctypes.CDLL(None).mallopt
    for name, value in {_M_ARENA_MAX: 1, **settings}.items():
        mallopt(name, value)
    return True


def release_freed_memory() -> None:
    """Return the freed memory that `keep_freed_memory` made this process keep to the system."""
    if _is_glibc() and not configured_by_user(os.environ):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def configured_by_user(environment: Mapping[str, str]) -> bool:
    """Return whether the environment configures glibc's malloc or preloads another allocator."""
    return (
        any(f"MALLOC_{name}" in environment for name in _SETTINGS)
        or "glibc.malloc." in environment.get("GLIBC_TUNABLES", "")
        or "malloc" in environment.get("LD_PRELOAD", "")
    )


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory available to this process: Linux's MemAvailable, or the control group's limit if that is lower.

    Supports control groups v1 and v2, of the process or its container. 0 if both values are unknown. root: the root of the file system
    with /proc and /sys.
    """
    limits = [_bytes(root / "proc/meminfo", field="MemAvailable")]
    for group in _control_groups(root / "proc/self/cgroup"):
        limits.append(_bytes(root / "sys/fs/cgroup" / group / "memory.max"))
        limits.append(_bytes(root / "sys/fs/cgroup/memory" / group / "memory.limit_in_bytes"))
    return min((limit for limit in limits if limit is not None), default=0)


def _control_groups(file: Path) -> list[str]:
    """List the process's control groups and their parents, relative to the root. "" is the root, in a container the container's group."""
    groups = {""}
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            parts = [part for part in path.split("/") if part not in ("", "..")]
            groups |= {"/".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    return sorted(groups)


def _bytes(file: Path, *, field: str | None = None) -> int | None:
    """Read the number in a file, or with `field` the field's number of KiB as bytes. None without a number, as for "max"."""
    try:
        text = file.read_text("ascii")
        if field is None:
            return int(text)
        return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(f"{field}:"))
    except (OSError, ValueError, StopIteration):
        return None


def _is_glibc() -> bool:
    if sys.platform != "linux":
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except ValueError:  # musl does not define the name
        return False


def _address_space_is_limited() -> bool:
    import resource

    kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    if any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in kinds):
        return True
    return (
        _bytes(Path("/proc/sys/vm/overcommit_memory")) == 2
    )  # the system then counts reserved addresses as used memory
