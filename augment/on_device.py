"""Copy small tensors to the device of the images without a synchronisation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def on_device(values: Any, device: "torch.device", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
    """Return `torch.tensor(values, dtype=dtype)` on `device`.

    A copy from pageable memory blocks the CPU until the GPU has finished its queue. A copy from pinned memory does not.
    """
    import torch

    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
