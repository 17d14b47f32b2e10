"""Describe the GPUs in use (name, driver, memory), and their out-of-memory errors."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from refract.models.bundle.bundle import BundleError

DRIVER = Path("/proc/driver/nvidia/version")
GIB = 1 << 30


class Gpu(NamedTuple):
    """One GPU or MIG slice. total, free: bytes of its memory; allocated: bytes in tensors of this process."""

    device: str
    name: str
    driver: str | None
    total: int
    free: int
    allocated: int


def describe(devices: Sequence[str]) -> list[Gpu]:
    """Return the distinct GPUs among `devices`."""
    return [_describe(name) for name in dict.fromkeys(devices) if name.startswith("cuda")]


def _describe(device: str) -> Gpu:
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    return Gpu(device, name, driver_version(), total, free, torch.cuda.memory_allocated(device))


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None without the driver."""
    try:
        text = DRIVER.read_text("ascii", "replace")
    except OSError:
        return None
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else None


def unseen() -> str | None:
    """Return the reason why PyTorch finds no GPU although NVIDIA's driver is installed; None if it finds one, or without the driver."""
    if torch.cuda.is_available() or driver_version() is None:
        return None
    if torch.version.cuda is None:
        return "the installed torch is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}"
    return "a container sees GPUs with `docker run --gpus all`; `nvidia-smi` shows what the driver offers"


def is_out_of_memory(err: BaseException) -> bool:
    """Return whether the error means that a device's memory is full, as raised by PyTorch or by a library on the GPU."""
    return isinstance(err, torch.OutOfMemoryError) or (isinstance(err, RuntimeError) and "ALLOC_FAILED" in str(err))


@contextmanager
def naming_memory(device: torch.device, what: str) -> Iterator[None]:
    """Raise BundleError, with the device's free memory, if `what` does not fit into it."""
    try:
        yield
    except RuntimeError as err:
        if not is_out_of_memory(err):
            raise
        free = f"{_free(device)} of its memory are free" if device.type == "cuda" else "its memory is full"
        raise BundleError(
            f"{device} has too little memory for {what}: {free}; stop other programs on it, or choose another --device"
        ) from err


def _free(device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    return f"{free / GIB:.1f} of {total / GIB:.1f} GiB"
