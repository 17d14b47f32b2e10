"""The pretrained networks that `refract init` proposes, and which of them this machine has. Contacts no server.

docs/models.md recommends further networks. This list has those under free licences that one GPU or a CPU trains quickly.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from refract.models.pretrained.packages import package_of


@dataclass(frozen=True)
class Backbone:
    """A network with pretrained weights.

    name: value of `model.name`; trained_at: side in pixels of the images that the weights were trained on; reason: a phrase;
    fixed_size: side in pixels of the input for images of any size, 0 to use `trained_at` where the images are large enough.
    """

    name: str
    trained_at: int
    reason: str
    fixed_size: int = 0


LITE = tuple(
    Backbone(f"timm/tf_efficientnet_lite{number}", trained_at, reason)
    for number, trained_at, reason in (
        (0, 224, "pretrained on ImageNet and fast on a CPU; lite2 is better and slower"),
        (1, 240, "pretrained on ImageNet and fast on a CPU; lite2 is better and slower"),
        (2, 260, "pretrained on ImageNet; the best of EfficientNet-Lite's three small sizes"),
    )
)
RESNET18 = Backbone("resnet18", 224, "pretrained on ImageNet and fast; resnet50 is better and slower")
CONVNEXT = Backbone("timm/convnext_tiny.in12k_ft_in1k", 224, "pretrained on ImageNet-12k; accurate, for a GPU")
DINOV2 = Backbone(
    "timm/vit_small_patch14_dinov2.lvd142m", 518, "pretrained by DINOv2; its features need few labels", fixed_size=224
)

ON_CPU = (*LITE, RESNET18)
ON_GPU = (CONVNEXT, DINOV2, *reversed(LITE), RESNET18)
ON_GPU_FEW = (DINOV2, CONVNEXT, *reversed(LITE), RESNET18)
"""Best first: on a CPU, on a GPU, and on a GPU with few images per class."""


def choose_backbone(present: tuple[Backbone, ...], *, gpu: bool, few: bool) -> Backbone | None:
    """Return the best backbone for the machine and the data, or None if no suitable one is present. few: few images per class."""
    order = (ON_GPU_FEW if few else ON_GPU) if gpu else ON_CPU
    return next((backbone for backbone in order if backbone in present), None)


def backbones_present() -> tuple[Backbone, ...]:
    """Return the backbones whose weights are on this machine: in an installed package, or in a cache of earlier downloads."""
    return tuple(backbone for backbone in ON_GPU if has_weights(backbone.name))


def has_weights(name: str) -> bool:
    """Whether the pretrained weights of a network of torchvision or timm are on this machine."""
    package = package_of(name)
    if package is not None and package.installed:
        return True
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if not name.startswith("timm/"):
        torch_home = Path(os.environ.get("TORCH_HOME") or caches / "torch")
        return any((torch_home / "hub" / "checkpoints").glob(f"{name}-*.pth"))
    hub_home = Path(os.environ.get("HF_HOME") or caches / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or hub_home / "hub")
    tagged = name if "." in name else f"{name}.in1k"  # timm downloads this tag of EfficientNet-Lite
    return any(hub.glob(f"models--{tagged.replace('/', '--')}/snapshots/*/model.safetensors"))
