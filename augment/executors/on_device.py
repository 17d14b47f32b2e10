"""Small tensors of draws on the device of the images, without making the device wait."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def on_device(values: Any, device: "torch.device", dtype: "torch.dtype | None" = None) -> "torch.Tensor":
    """`torch.tensor(values, dtype=dtype)` on `device`.

    A copy from pageable memory makes the processor wait until a GPU has done all its work. From pinned memory it does not.
    """
    import torch

    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
