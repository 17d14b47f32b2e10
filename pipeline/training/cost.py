"""What a training cost: its time and, where the machine tells it, its energy, over all the processes that it took."""

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

POWERCAP = Path("/sys/class/powercap")
EVERY_SECONDS = 60.0
"""Between readings: a processor's counter begins anew after some ten minutes of full load at the earliest."""


class Cost(Callback):
    """Counts from its making until `close`. A training that goes on has in its checkpoint what was counted before."""

    def __init__(self, device: str) -> None:
        """device: `cuda` counts the GPUs that this process sees."""
        self._began = time.monotonic()
        self._before: dict[str, float] = {}
        self._energy = EnergyMeter(gpus=device == "cuda")

    def figures(self) -> dict[str, float]:
        """`minutes`, and `kilojoules` where all of them counted energy: of the whole processors and GPUs, whoever else used them."""
        own = {"minutes": (time.monotonic() - self._began) / 60}
        if (joules := self._energy.joules()) is not None:
            own["kilojoules"] = joules / 1000
        before = self._before or dict.fromkeys(own, 0.0)
        return {name: value + before[name] for name, value in own.items() if name in before}

    def close(self) -> None:
        """Read no more."""
        self._energy.close()

    def resume_from(self, checkpoint: Path) -> None:
        """Count on from what a checkpoint has, where no training loads it."""
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["callbacks"].get("Cost", {})
        self._before = state

    def state_dict(self) -> dict[str, Any]:
        return dict(self.figures())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict


class EnergyMeter:
    """The energy that the processors' (RAPL, Linux) and the GPUs' (NVML) own counters count from now on. RAPL is often root's alone."""

    def __init__(self, *, gpus: bool, root: Path = POWERCAP) -> None:
        # package-0 … are whole processors, psys is all of the machine again, others are parts; AMD's folders are called intel-rapl too.
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
        """So far; None where no counter can be read."""
        if not self._last:
            return None
        with self._lock:
            now = self._readings()
            for name, (value, whole) in now.items():
                gone = value - self._last.get(name, (value, whole))[0]
                self._joules += gone if gone >= 0 else max(0.0, gone + whole)  # the counter began anew
            self._last |= now  # a reading that failed is made up for by the next
            return self._joules

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(EVERY_SECONDS):
            self.joules()

    def _readings(self) -> dict[str, tuple[float, float]]:
        """counter → (joules, joules at which it begins anew)"""
        found = {}
        for folder in self._packages:
            if (value := _number(folder, "energy_uj")) is not None:
                found[folder.name] = (value / 1e6, (_number(folder, "max_energy_range_uj") or 0.0) / 1e6)
        for handle in self._gpus:
            import pynvml

            with contextlib.suppress(pynvml.NVMLError):
                found[str(handle)] = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)
        return found


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text().strip()
    except OSError:
        return ""


def _number(folder: Path, name: str) -> float | None:
    text = _text(folder, name)
    return float(text) if text.isdigit() else None


def _gpus() -> list[Any]:
    """NVML's handles of the GPUs that PyTorch sees and that count their energy (Volta and newer)."""
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
