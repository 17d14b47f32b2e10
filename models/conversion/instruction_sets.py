"""What this CPU computes fast, and the bits of a quantised weight that follow from it."""

import platform
from collections.abc import Mapping

import torch


def capabilities() -> Mapping[str, bool]:
    """Return the instruction sets of this CPU, by PyTorch's names."""
    instructions: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return instructions


def weight_bits() -> int:
    """Return the bits of a weight: 8, or 7 on x86 without VNNI, which adds two 8-bit products in 16 bits and saturates."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return 7 if on_x86 and not any(capabilities().get(name) for name in ("avx512_vnni", "avx_vnni")) else 8
