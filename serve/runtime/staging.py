"""Copy batches to a device and outputs back, through pinned memory and a copy stream, while the device computes another batch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Staging:
    """The buffers of one thread. Call `load` again only after the outputs of the previous batch were read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        on_gpu = device.type == "cuda"
        # A GPU copies pinned memory without the CPU. With a blocking event the thread sleeps until the outputs are ready.
        self._host: dict[str, Any] = {"pin_memory": on_gpu}
        self._copies = torch.cuda.Stream(device) if on_gpu else torch.cpu.Stream()
        self._ready = torch.cuda.Event(blocking=True) if on_gpu else torch.cpu.Event()
        self._inputs = self._images = self._outputs = torch.empty(0)

    def load(self, batch: np.ndarray) -> Tensor:
        """Copy `batch`, uint8 N×H×W×3, to the device as N×3×H×W. The device's current stream waits for the copy."""
        count = len(batch)
        if self._inputs.shape[1:] != batch.shape[1:] or len(self._inputs) < count:
            self._inputs = torch.empty(batch.shape, dtype=torch.uint8, **self._host)
            self._images = torch.empty(batch.shape, dtype=torch.uint8, device=self._device)
        np.copyto(self._inputs[:count].numpy(), batch)
        with self._module.stream(self._copies):
            self._images[:count].copy_(self._inputs[:count], non_blocking=True)
        self._module.current_stream(self._device).wait_stream(self._copies)
        return self._images[:count].permute(0, 3, 1, 2)

    def unload(self, outputs: Tensor) -> Callable[[], np.ndarray]:
        """Start the copy of float32 N×… to the host. The returned function waits for it, and returns the array."""
        count = len(outputs)
        if self._outputs.shape[1:] != outputs.shape[1:] or len(self._outputs) < count:
            self._outputs = torch.empty(outputs.shape, dtype=torch.float32, **self._host)
        host = self._outputs[:count]
        host.copy_(outputs, non_blocking=True)
        self._ready.record(self._module.current_stream(self._device))

        def wait() -> np.ndarray:
            self._ready.synchronize()
            return host.numpy().copy()

        return wait
