"""Time on a device, which computes after the call has returned."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any


def wait(device: str) -> None:
    """Let the device finish what it was given."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def timed(call: Callable[[], object], device: str, *, seconds: float, rounds: int = 30, warm_up: int = 2) -> float:
    """The median seconds of a call: of at most `rounds` calls after the warm-up, in about `seconds`; at least one is timed."""
    end = time.monotonic() + seconds
    for _ in range(warm_up):
        call()
    times: list[float] = []
    while not times or (len(times) < rounds and time.monotonic() < end):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - started)
    return median(times)


def device_facts(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    if not device.startswith("cuda"):
        return {"device": device, "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else str(version)
    except Exception:  # the package or the library may be missing; the number is a fact for the reader, no more
        return None
