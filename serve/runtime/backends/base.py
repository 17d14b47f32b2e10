"""The interface of a backend: how it computes a network, and on which devices."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refract.models.features import FeatureClassifier

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""uint8 N×3×H×W on the device → float32 (logits N×C, embedding N×D)."""

AGREED = 0.03
INT8_AGREED = 0.1
"""Largest allowed difference of a golden sample's probability from plain float32. bfloat16 changes it by 2e-3 on resnet18 and by 0.02 on a
network for CIFAR-10. 8-bit integers change that network's by 0.07, and a similar network's by 0.12 with 7-bit weights. So 8-bit backends
are used only on request."""


def _always(device: torch.device) -> bool:
    return True


@dataclass(frozen=True)
class Backend:
    """One way to compute a network.

    build: (network, example images uint8 N×3×H×W on its device, folder for converted networks) → function. With int8 the network is
    calibrated on the examples, if it is not in the folder.
    embeds: whether the network is a `FeatureClassifier` and the function a Forward; if not, the network is a `Classifier`, the function
    returns only logits, and the server has no embeddings.
    devices: types of `torch.device` that it supports. files: the converted networks that `build` stores in the folder.
    agreed: largest allowed difference of a probability from plain float32. int8: whether it computes in 8-bit integers.
    automatic: returns whether `auto` times it on the device.
    requires: (the package besides torch that it needs, the command that installs it). A stored choice holds for the package's version.
    """

    name: str
    build: Callable[[Any, Tensor, Path], Callable[[Tensor], Any]]
    devices: tuple[str, ...]
    files: tuple[str, ...] = ()
    agreed: float = AGREED
    int8: bool = False
    automatic: Callable[[torch.device], bool] = _always
    embeds: bool = False
    requires: tuple[str, str] | None = None

    def missing(self) -> str | None:
        """Return which package is not installed, and how to install it; None if all are."""
        if self.requires is None or importlib.util.find_spec(self.requires[0]) is not None:
            return None
        return f"needs the package {self.requires[0]}: {self.requires[1]}"

    def offered(self, device: torch.device) -> bool:
        """Return whether `auto` times it on this device: never if it computes in 8-bit integers, which changes the predictions."""
        usable = device.type in self.devices and self.missing() is None
        return usable and not self.int8 and self.automatic(device)

    def forward(self, network: FeatureClassifier, images: Tensor, folder: Path) -> Forward:
        """Build the function that computes the network. Without `embeds` its embeddings have no values, N×0."""
        if self.embeds:
            return self.build(network, images, folder)
        logits_of = self.build(network.classifier, images, folder)

        def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
            logits = logits_of(batch)
            return logits, logits.new_empty((len(logits), 0))

        return forward
