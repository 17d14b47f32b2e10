"""The catalogues of third-party networks: torchvision's classification models and timm's.

Both libraries are heavy, so they are imported on first use. Independent of Refract's networks.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from torch import nn

from refract.models.head import replace_head
from refract.models.pretrained.packages import packages_hint


class Catalogue(Protocol):
    """A source of networks by name."""

    def names(self) -> list[str]:
        """List every name, without tags of weights."""

    def has(self, name: str) -> bool:
        """Return whether `build` accepts the name."""

    def build(
        self, name: str, num_classes: int, image_size: tuple[int, int], pretrained: bool, args: dict
    ) -> nn.Module:
        """Build a network that maps (N, 3, H, W) to logits (N, num_classes).

        ValueError if the network rejects an argument or a download fails.
        """

    def loads_head(self, name: str, num_classes: int) -> bool:
        """Return whether the pretrained weights fill the head of a network with `num_classes` outputs."""

    def preprocess(self, name: str) -> dict[str, Any] | None:
        """Return the preprocessing of the pretrained weights: {"mean", "std", "image_size", "crop_ratio"}; None without weights."""


class Torchvision:
    """torchvision.models, classification only, unquantised."""

    def names(self) -> list[str]:
        """List every name."""
        from torchvision import models

        return models.list_models(module=models)

    def has(self, name: str) -> bool:
        """Return whether the name is one of `names`."""
        return name in self.names()

    def build(
        self, name: str, num_classes: int, image_size: tuple[int, int], pretrained: bool, args: dict
    ) -> nn.Module:
        """Build the network with a new head. Its stem is not adapted to small images."""
        from torchvision import models

        def create(weights: str | None) -> nn.Module:
            return models.get_model(name, weights=weights, **{**_torchvision_args(name, image_size), **args})

        network = _create(
            f"torchvision/{name}", args, lambda: create("DEFAULT" if pretrained else None), pretrained=pretrained
        )
        return replace_head(network, num_classes)

    def loads_head(self, name: str, num_classes: int) -> bool:
        """Return False: `build` always creates a new head."""
        return False

    def preprocess(self, name: str) -> dict[str, Any] | None:
        """Read the preprocessing from the transforms of the weights."""
        from torchvision import models

        expected = models.get_model_weights(name).DEFAULT.transforms()
        crop, resize = expected.crop_size[0], expected.resize_size[0]
        return _preprocess(expected.mean, expected.std, (crop, crop), crop / resize)


class Timm:
    """timm's registry; a name may include the tag of its weights, as in resnet18.a1_in1k."""

    def names(self) -> list[str]:
        """List every name, without tags."""
        import timm

        return timm.list_models()

    def has(self, name: str) -> bool:
        """Return whether timm has the architecture, with any tag. Always False for a path or a "hf-hub:" address."""
        import timm

        return re.fullmatch(r"\w+(\.\w+)?", name) is not None and timm.is_model(name)

    def build(
        self, name: str, num_classes: int, image_size: tuple[int, int], pretrained: bool, args: dict
    ) -> nn.Module:
        """Build the network with `num_classes` outputs. An architecture with a fixed input size is built for `image_size`."""
        import timm

        sized = _create(f"timm/{name}", args, lambda: self.sized(name, image_size))

        def create(pretrained: bool) -> nn.Module:
            return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **{**sized, **args})

        return _create(f"timm/{name}", args, lambda: create(pretrained), pretrained=pretrained)

    def sized(self, name: str, image_size: tuple[int, int]) -> dict[str, Any]:
        """Return the argument for the image size, {} for an architecture that takes any."""
        import timm

        cfg = timm.get_pretrained_cfg(name)
        return {"img_size": image_size} if cfg is not None and cfg.fixed_input_size else {}

    def loads_head(self, name: str, num_classes: int) -> bool:
        """Return whether the weights were trained for `num_classes` classes, because timm then loads their head."""
        import timm

        cfg = timm.get_pretrained_cfg(name)
        return cfg is not None and cfg.num_classes == num_classes

    def preprocess(self, name: str) -> dict[str, Any] | None:
        """Read the preprocessing from the weights' pretrained_cfg."""
        import timm

        cfg = timm.get_pretrained_cfg(name)
        if cfg is None or not cfg.has_weights:
            return None
        _, height, width = cfg.input_size
        return _preprocess(cfg.mean, cfg.std, (height, width), cfg.crop_pct)


def _preprocess(mean: Any, std: Any, image_size: tuple[int, int], crop_ratio: float) -> dict[str, Any]:
    return {"mean": list(mean), "std": list(std), "image_size": list(image_size), "crop_ratio": float(crop_ratio)}


def _create(name: str, args: Mapping[str, Any], create: Callable[[], Any], *, pretrained: bool = False) -> Any:
    """Call `create`. ValueError says whether the arguments or, for a pretrained network, the weights caused the failure."""
    try:
        return create()
    except Exception as err:
        if not pretrained or isinstance(err, (TypeError, ValueError, AssertionError, KeyError)):
            reason = (str(err).splitlines() or [type(err).__name__])[0]
            raise ValueError(f"network {name!r} rejects its arguments {dict(args)}: {reason}") from err
        # The hubs raise exceptions of their HTTP clients, which differ between releases.
        raise ValueError(
            f"network {name!r}: no weights or no connection: {type(err).__name__}: {err}; "
            f"set weights=PATH of a .safetensors or .pth file, or weights='none'; {packages_hint(name)}"
        ) from err


def _torchvision_args(name: str, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments that make a network a rebuildable map from (N, 3, H, W) to one tensor of logits."""
    if name.startswith("vit_"):
        if image_size[0] != image_size[1]:
            raise ValueError(f"image_size={image_size}: torchvision/{name} needs a square, such as [224, 224]")
        return {"image_size": image_size[0]}
    if name == "maxvit_t":
        return {"input_size": image_size}
    return dict(_PLAIN_OUTPUT.get(name, {}))


# Auxiliary logits are off, so that the network returns one tensor in training mode too. torchvision sets transform_input when it loads its
# weights. Refract always sets it, so that a name builds the same function with and without weights.
_PLAIN_OUTPUT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": True},
        "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": True},
    }
)

CATALOGUES: Mapping[str, Catalogue] = MappingProxyType({"torchvision": Torchvision(), "timm": Timm()})
