"""The two catalogues of networks that others maintain: torchvision's classification models and timm's.

Both are heavy, so they are imported when they are asked. Knows nothing of Refract's own networks.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from torch import nn

from refract.models.head import replace_head


class Catalogue(Protocol):
    """A source of networks by name."""

    def names(self) -> list[str]:
        """Every name, without tags of weights."""

    def has(self, name: str) -> bool:
        """Whether `build` knows the name."""

    def build(
        self, name: str, num_classes: int, image_size: tuple[int, int], pretrained: bool, args: dict
    ) -> nn.Module:
        """(N, 3, H, W) → logits (N, num_classes). ValueError if the network rejects an argument or a download fails."""

    def loads_head(self, name: str, num_classes: int) -> bool:
        """Whether the pretrained weights fill the head of a network with `num_classes` outputs."""

    def preprocess(self, name: str) -> dict[str, Any] | None:
        """What the pretrained weights expect: {"mean", "std", "image_size", "crop_ratio"}; None if there are none."""


class Torchvision:
    """torchvision.models, classification only, unquantised."""

    def names(self) -> list[str]:
        """Every name."""
        from torchvision import models

        return models.list_models(module=models)

    def has(self, name: str) -> bool:
        """Whether the name is one of `names`."""
        return name in self.names()

    def build(
        self, name: str, num_classes: int, image_size: tuple[int, int], pretrained: bool, args: dict
    ) -> nn.Module:
        """The network with a new head. Its stem is left as it is, also for small images."""
        from torchvision import models

        def create(weights: str | None) -> nn.Module:
            return models.get_model(name, weights=weights, **{**_torchvision_args(name, image_size), **args})

        network = _create(
            f"torchvision/{name}", args, lambda: create("DEFAULT" if pretrained else None), pretrained=pretrained
        )
        return replace_head(network, num_classes)

    def loads_head(self, name: str, num_classes: int) -> bool:
        """Never: `build` always gives a new head."""
        return False

    def preprocess(self, name: str) -> dict[str, Any] | None:
        """From the weights' own transforms."""
        from torchvision import models

        expected = models.get_model_weights(name).DEFAULT.transforms()
        crop, resize = expected.crop_size[0], expected.resize_size[0]
        return _preprocess(expected.mean, expected.std, (crop, crop), crop / resize)


class Timm:
    """timm's registry; a name may carry the tag of its weights, as in resnet18.a1_in1k."""

    def names(self) -> list[str]:
        """Every name, without tags."""
        import timm

        return timm.list_models()

    def has(self, name: str) -> bool:
        """Whether timm has the architecture, whatever the tag. Never true of a path or of a "hf-hub:" address."""
        import timm

        return re.fullmatch(r"\w+(\.\w+)?", name) is not None and timm.is_model(name)

    def build(
        self, name: str, num_classes: int, image_size: tuple[int, int], pretrained: bool, args: dict
    ) -> nn.Module:
        """The network with `num_classes` outputs; where its size is fixed at construction, for `image_size`."""
        import timm

        cfg = _create(f"timm/{name}", args, lambda: timm.get_pretrained_cfg(name))
        sized = {"img_size": image_size} if cfg is not None and cfg.fixed_input_size else {}

        def create(pretrained: bool) -> nn.Module:
            return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **{**sized, **args})

        return _create(f"timm/{name}", args, lambda: create(pretrained), pretrained=pretrained)

    def loads_head(self, name: str, num_classes: int) -> bool:
        """Whether the weights were trained for as many classes: timm keeps their head then."""
        import timm

        cfg = timm.get_pretrained_cfg(name)
        return cfg is not None and cfg.num_classes == num_classes

    def preprocess(self, name: str) -> dict[str, Any] | None:
        """From the weights' pretrained_cfg."""
        import timm

        cfg = timm.get_pretrained_cfg(name)
        if cfg is None or not cfg.has_weights:
            return None
        _, height, width = cfg.input_size
        return _preprocess(cfg.mean, cfg.std, (height, width), cfg.crop_pct)


def _preprocess(mean: Any, std: Any, image_size: tuple[int, int], crop_ratio: float) -> dict[str, Any]:
    return {"mean": list(mean), "std": list(std), "image_size": list(image_size), "crop_ratio": float(crop_ratio)}


def _create(name: str, args: Mapping[str, Any], create: Callable[[], Any], *, pretrained: bool = False) -> Any:
    """Call `create`; ValueError that says whether the arguments or, of a pretrained network, the weights were the fault."""
    try:
        return create()
    except Exception as err:
        if not pretrained or isinstance(err, (TypeError, ValueError, AssertionError, KeyError)):
            why = (str(err).splitlines() or [type(err).__name__])[0]
            raise ValueError(f"network {name!r} rejects its arguments {dict(args)}: {why}") from err
        # The hubs raise their own HTTP clients' exceptions, which differ from release to release.
        raise ValueError(
            f"network {name!r}: no weights or no connection: {type(err).__name__}: {err}; "
            "give weights=PATH of a .safetensors or .pth file, or weights='none'"
        ) from err


def _torchvision_args(name: str, image_size: tuple[int, int]) -> dict[str, Any]:
    """The arguments without which a network would not be a plain, rebuildable map from (N, 3, H, W) to logits."""
    if name.startswith("vit_"):
        if image_size[0] != image_size[1]:
            raise ValueError(f"image_size={image_size}: torchvision/{name} expected a square")
        return {"image_size": image_size[0]}
    if name == "maxvit_t":
        return {"input_size": image_size}
    return dict(_PLAIN_OUTPUT.get(name, {}))


# Auxiliary logits off, so that training mode too gives one tensor. transform_input is what torchvision sets when it
# loads its weights; set always, the same name builds the same function with and without them.
_PLAIN_OUTPUT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": True},
        "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": True},
    }
)

CATALOGUES: Mapping[str, Catalogue] = MappingProxyType({"torchvision": Torchvision(), "timm": Timm()})
