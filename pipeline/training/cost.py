"""Measure the cost of a training: its time and, where the hardware counts it, its energy, over all its interrupted processes."""

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import torch

from refract.models.training.lightning_imports import Callback

POWERCAP = Path("/sys/class/powercap")
EVERY_SECONDS = 60.0
"""Seconds between readings. A processor's counter wraps around after ten minutes of full load at the earliest."""


class Cost(Callback):
    """Counts from its construction until `close`. The checkpoint of a resumed training holds the earlier totals."""

    def __init__(self, device: str) -> None:
        """device: `cuda` counts the energy of the GPUs that this process sees."""
        self._started = time.monotonic()
        self._before: dict[str, float] = {}
        self._energy = EnergyMeter(gpus=device == "cuda")

    def totals(self) -> dict[str, float]:
        """Return `minutes`, and `kilojoules` if every process of the training counted energy.

        The energy is that of whole processors and GPUs, including other programs on them.
        """
        current = {"minutes": (time.monotonic() - self._started) / 60}
        if (joules := self._energy.joules()) is not None:
            current["kilojoules"] = joules / 1000
        before = self._before or dict.fromkeys(current, 0.0)
        return {name: value + before[name] for name, value in current.items() if name in before}

    def close(self) -> None:
        """Stop reading the counters."""
        self._energy.close()

    def resume_from(self, checkpoint: Path) -> None:
        """Add the totals of a checkpoint, for a run that resumes after its training finished."""
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["callbacks"].get("Cost", {})
        self._before = state

    def state_dict(self) -> dict[str, Any]:
        return dict(self.totals())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict


class EnergyMeter:
    """Reads the energy counters of processors (RAPL, Linux) and GPUs (NVML). Often only root can read RAPL."""

    def __init__(self, *, gpus: bool, root: Path = POWERCAP) -> None:
        # package-0 … are whole processors, psys repeats the whole machine, others are parts. AMD's folders are named intel-rapl too.
        folders = sorted(root.glob("intel-rapl:*"))
        packages = [folder for folder in folders if _text(folder, "name").startswith("package")]
        self._packages = [folder for folder in packages if _number(folder, "energy_uj") is not None]
        self._gpus = _gpus() if gpus else []
        self._last = self._readings()
        self._joules = 0.0
        self._lock, self._closed = threading.Lock(), threading.Event()
        if self._packages:
            threading.Thread(target=self._watch, daemon=True, name="energy").start()

    def joules(self) -> float | None:
        """Return the joules since construction, or None if no counter is readable."""
        if not self._last:
            return None
        with self._lock:
            now = self._readings()
            for name, (value, maximum) in now.items():
                used = value - self._last.get(name, (value, maximum))[0]
                self._joules += used if used >= 0 else max(0.0, used + maximum)  # the counter wrapped around
            self._last |= now  # the next reading includes the energy of a failed one
            return self._joules

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(EVERY_SECONDS):
            self.joules()

    def _readings(self) -> dict[str, tuple[float, float]]:
        """Return counter → (joules, joules at which it wraps around)."""
        readings = {}
        for folder in self._packages:
            if (value := _number(folder, "energy_uj")) is not None:
                readings[folder.name] = (value / 1e6, (_number(folder, "max_energy_range_uj") or 0.0) / 1e6)
        for handle in self._gpus:
            import pynvml

            with contextlib.suppress(pynvml.NVMLError):
                readings[str(handle)] = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)
        return readings


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text().strip()
    except OSError:
        return ""


def _number(folder: Path, name: str) -> float | None:
    text = _text(folder, name)
    return float(text) if text.isdigit() else None


def _gpus() -> list[Any]:
    """Return the NVML handles of the GPUs that PyTorch sees, empty unless all count their energy (Volta and newer)."""
    import pynvml

    try:
        pynvml.nvmlInit()
        seen = range(torch.cuda.device_count())
        handles = [
            pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(i).uuid}".encode()) for i in seen
        ]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return []
    return handles
