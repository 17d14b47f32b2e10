"""The interface of a backend: how it computes a network, and on which devices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from refract.models.classifier import Classifier

Forward = Callable[[Tensor], Tensor]
"""uint8 N×3×H×W on the device → float32 logits N×C."""

AGREED = 0.03
INT8_AGREED = 0.1
"""Largest allowed difference of a golden sample's probability from plain float32. bfloat16 changes it by 2e-3 on resnet18 and by 0.02 on a
network for CIFAR-10. 8-bit integers change that network's by 0.07, and a similar network's by 0.12 with 7-bit weights. So 8-bit backends
are used only on request."""


def _nothing(device: torch.device) -> None:
    return None


def _always(device: torch.device) -> bool:
    return True


@dataclass(frozen=True)
class Backend:
    """One way to compute a network.

    build: (classifier, example images uint8 N×3×H×W on its device, folder for converted networks) → Forward.
    devices: types of `torch.device` that it supports. files: the converted networks that `build` stores in the folder.
    agreed: largest allowed difference of a probability from plain float32. int8: whether it computes in 8-bit integers.
    missing: returns why it cannot run on this machine, None if it can. automatic: returns whether `auto` times it on the device.
    """

    name: str
    build: Callable[[Classifier, Tensor, Path], Forward]
    devices: tuple[str, ...]
    files: tuple[str, ...] = ()
    agreed: float = AGREED
    int8: bool = False
    missing: Callable[[torch.device], str | None] = _nothing
    automatic: Callable[[torch.device], bool] = _always

    def offered(self, device: torch.device) -> bool:
        """Return whether `auto` times it on this device."""
        return device.type in self.devices and self.automatic(device) and self.missing(device) is None


def needs(package: str, install: str) -> Callable[[torch.device], str | None]:
    """Build a `missing` function that checks for an installed package. install: the command that installs it."""
    import importlib.util

    def missing(device: torch.device) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"needs the package {package}: {install}"
        return None

    return missing


def capabilities() -> Mapping[str, bool]:
    """Return the instruction sets of this CPU, by PyTorch's names."""
    instructions: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return instructions


def first_line(err: Exception) -> str:
    """Return the first line of the error's message, at most 200 characters."""
    return (str(err).splitlines() or [""])[0][:200] or type(err).__name__
