"""What a backend is: one way to compute a network, and where it can do so."""

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
"""Largest difference of a golden sample's probability from plain float32. bfloat16 moves them by 2e-3 on resnet18 and by 0.02 on a network
for CIFAR-10. Integers of 8 bits move that network's by 0.07, and a similar network's by 0.12 where weights have 7 bits: those are used
only where they are asked for."""


def _nothing(device: torch.device) -> None:
    return None


def _always(device: torch.device) -> bool:
    return True


@dataclass(frozen=True)
class Backend:
    """One way to compute a network.

    build: (classifier, example images uint8 N×3×H×W on its device, folder for converted networks) → Forward.
    devices: types of `torch.device` that it computes on. files: the converted networks that `build` keeps in the folder.
    agreed: largest difference of a probability from plain float32. int8: whether it computes in integers of 8 bits.
    missing: the reason why it cannot compute on this machine, None where it can. automatic: whether `auto` times it on the device.
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
        """Whether `auto` times it on this device."""
        return device.type in self.devices and self.automatic(device) and self.missing(device) is None


def needs(package: str, install: str) -> Callable[[torch.device], str | None]:
    """A `missing` that asks for an installed package. install: the command that installs it."""
    import importlib.util

    def missing(device: torch.device) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"needs the package {package}: {install}"
        return None

    return missing


def capabilities() -> Mapping[str, bool]:
    """Instruction sets of this processor, by PyTorch's names."""
    known: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return known


def first_line(err: Exception) -> str:
    """The first line of the error's text, at most 200 characters."""
    return (str(err).splitlines() or [""])[0][:200] or type(err).__name__
