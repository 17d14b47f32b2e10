"""Networks by name: Refract's own, then torchvision's, then timm's. Each maps (N, 3, H, W) floats to logits (N, C).

Knows nothing of training, of normalisation or of bundles. torchvision and timm are imported when a name asks for them.
"""

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from refract.models.architectures.cnn import CNN
from refract.models.architectures.fastnet import FastNet
from refract.models.architectures.handcrafted_features import LinearOnFeatures
from refract.models.architectures.lenet import LeNet5
from refract.models.architectures.mlp import MLP, Perceptron
from refract.models.architectures.rbf import RBFNetwork
from refract.models.architectures.resnet import ResNet20
from refract.models.head import head_of, neutralise_head, swap_head
from refract.models.pretrained.catalogues import CATALOGUES
from refract.models.pretrained.weights import folder_preprocess, load_weights

__all__ = ["NETWORKS", "build", "head_of", "weights_preprocess"]


def build(
    name: str,
    num_classes: int,
    *,
    image_size: tuple[int, int],
    weights: str = "none",
    head: str = "linear",
    args: Mapping[str, Any] | None = None,
    **more: Any,
) -> nn.Module:
    """The network `name` with a head for `num_classes`.

    name: one of NETWORKS, a torchvision classification model, or a timm model; `torchvision/NAME` and `timm/NAME` force
    one. image_size: (height, width) in pixels. weights: "none"; "default", the pretrained ones of torchvision or timm,
    by their own download; or a file, folder or URL, see `refract.models.pretrained.weights`. head: linear, the network's own; or of
    `refract.models.head.HEADS`, in
    the place of the last layer. args: the network's; they can be given by name as well. A head that the loaded weights do not fill gives
    every class the same logit, see `refract.models.head.neutralise_head`.
    ValueError for an unknown name (with the nearest ones), arguments that the network rejects or that are reserved,
    weights that do not fit or cannot be had; FileNotFoundError if the file of weights is missing.
    """
    args = {**(args or {}), **more}
    source, plain = _locate(name)
    _check_args(name, num_classes, args)
    pretrained = weights == "default"
    if source is not None:
        network = CATALOGUES[source].build(plain, num_classes, image_size, pretrained, args)
    elif pretrained:
        raise ValueError(f"weights='default': {name} has none; expected 'none' or the path of a file")
    else:
        network = _build_own(name, num_classes, image_size, args)
    if head != "linear":
        swap_head(network, head)
    fresh = (
        source is not None
        and pretrained
        and (head != "linear" or not CATALOGUES[source].loads_head(plain, num_classes))
    )
    if weights not in ("none", "default"):
        fresh = bool(load_weights(network, head_of(network), weights).reinitialised)
    return neutralise_head(network) if fresh else network


def weights_preprocess(name: str, weights: str) -> dict[str, Any] | None:
    """What the pretrained weights were trained on: {"mean", "std", "image_size": [h, w], "crop_ratio"}, plain numbers.

    From the record beside the weights, see `refract.models.pretrained.weights.folder_preprocess`; else from
    torchvision's or timm's metadata of the
    network, as files of its weights are nearly always those. None for weights="none", and where nothing is known.
    ValueError for an unknown name.
    """
    source, plain = _locate(name)
    if weights == "none":
        return None
    recorded = None if weights == "default" else folder_preprocess(weights)
    return recorded or (None if source is None else CATALOGUES[source].preprocess(plain))


def _locate(name: str) -> tuple[str | None, str]:
    """(catalogue, name in it), or (None, name) for an own network. Asks own networks first: it is the cheapest."""
    if name in NETWORKS:
        return None, name
    prefix, _, plain = name.partition("/")
    asked = [prefix] if plain and prefix in CATALOGUES else list(CATALOGUES)
    wanted = plain if plain and prefix in CATALOGUES else name
    for source in asked:
        if CATALOGUES[source].has(wanted):
            return source, wanted
    near = [
        f"{source}/{n}" for source in asked for n in difflib.get_close_matches(wanted, CATALOGUES[source].names(), n=3)
    ]
    own = difflib.get_close_matches(wanted, NETWORKS, n=1)
    raise ValueError(
        f"network {name!r} is unknown: own networks are {', '.join(NETWORKS)}; "
        f"nearest: {', '.join(own + near) or 'none'} (torchvision/NAME and timm/NAME force one)"
    )


def _build_own(name: str, num_classes: int, image_size: tuple[int, int], args: Mapping[str, Any]) -> nn.Module:
    try:
        return NETWORKS[name](num_classes, image_size=image_size, **args)
    except TypeError as err:
        raise ValueError(f"network {name!r} rejects its arguments {dict(args)}: {err}") from err


def _check_args(name: str, num_classes: int, args: Mapping[str, Any]) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r}: expected a whole number above 0")
    for key in args:
        if not isinstance(key, str):
            raise ValueError(f"network {name!r}: the argument {key!r} is no name")
        if key in _RESERVED or key.startswith(("pretrained", "weights")):
            raise ValueError(
                f"network {name!r}: the argument {key!r} is reserved, as the network's weights, input and outputs are "
                "Refract's; use weights=… and the labels"
            )


# A bundle's record may come from a stranger: none of its arguments may name a file or an address to load from.
_RESERVED = frozenset(
    {
        "name",
        "head",
        "image_size",
        "num_classes",
        "in_chans",
        "features_only",
        "checkpoint_path",
        "cache_dir",
        "progress",
        "aux_logits",
        "scriptable",
    }
)

NETWORKS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "lenet5": LeNet5,
        "resnet20": ResNet20,
        "fastnet": FastNet,
        "cnn": CNN,
        "mlp": MLP,
        "perceptron": Perceptron,
        "rbf": RBFNetwork,
        "linear": LinearOnFeatures,
    }
)
