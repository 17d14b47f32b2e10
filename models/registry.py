"""Networks by name: Refract's first, then torchvision's, then timm's. Each maps (N, 3, H, W) floats to logits (N, C).

Independent of training, normalisation and bundles. torchvision and timm are imported only if a name needs them.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
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
from refract.models.pretrained.packages import WeightsPackage, package_of, packages_hint
from refract.models.pretrained.weights import folder_preprocess, load_tensors, load_weights
from refract.plugins import PluginError, add_entry

__all__ = ["NETWORKS", "build", "head_of", "locate", "weights_preprocess"]


def build(
    name: str,
    num_classes: int,
    *,
    image_size: tuple[int, int],
    weights: str = "none",
    head: str = "linear",
    head_rows: Sequence[int | None] | None = None,
    args: Mapping[str, Any] | None = None,
    **more: Any,
) -> nn.Module:
    """Build the network `name` with a head for `num_classes`.

    - name: one of NETWORKS, a torchvision classification model, or a timm model; `torchvision/NAME` and `timm/NAME` select the catalogue
    - image_size: (height, width) in pixels
    - weights: "none"; "default", pretrained weights of an installed package (see `refract.models.pretrained.packages`), else those that
      torchvision or timm downloads; or a file, folder or URL, see `refract.models.pretrained.weights`
    - head: `linear` keeps the network's last layer; a name of `refract.models.head.HEADS` replaces it
    - head_rows: for each class its row in the head of the file of weights, see `refract.models.pretrained.weights.load_weights`
    - args: arguments of the network, which may also be keyword arguments

    A head that the loaded weights do not fill gives every class the same logit, see `refract.models.head.neutralise_head`.
    ValueError for an unknown name (with the nearest ones), arguments that the network rejects or that are reserved,
    weights that do not fit or cannot be loaded; FileNotFoundError if the file of weights is missing.
    """
    args = {**(args or {}), **more}
    source, plain = locate(name)
    _check_args(name, num_classes, args)
    package = _installed_package(source, plain) if weights == "default" else None
    pretrained = weights == "default" and package is None
    if source is not None:
        network = CATALOGUES[source].build(plain, num_classes, image_size, pretrained, args)
    elif pretrained:
        raise ValueError(
            f"weights='default': {name} has no pretrained weights; expected 'none' or the path of a file; {packages_hint(name)}"
        )
    else:
        network = _build_builtin(name, num_classes, image_size, args)
    if head != "linear":
        swap_head(network, head)
    fresh = (
        source is not None
        and pretrained
        and (head != "linear" or not CATALOGUES[source].loads_head(plain, num_classes))
    )
    if package is not None:
        fresh = bool(load_tensors(network, head_of(network), package.read(), package.file).reinitialised)
    elif weights not in ("none", "default"):
        fresh = bool(load_weights(network, head_of(network), weights, head_rows).reinitialised)
    return neutralise_head(network) if fresh else network


def weights_preprocess(name: str, weights: str) -> dict[str, Any] | None:
    """Return the preprocessing of the pretrained weights: {"mean", "std", "image_size": [h, w], "crop_ratio"}, plain numbers.

    A record in the folder of the weights comes first, see `refract.models.pretrained.weights.folder_preprocess`. Without a record,
    torchvision's or timm's metadata of the network apply, as a file of its weights nearly always comes from there.
    None for weights="none", and if neither source has a record. ValueError for an unknown name.
    """
    source, plain = locate(name)
    if weights == "none":
        return None
    recorded = None if weights == "default" else folder_preprocess(weights)
    return recorded or (None if source is None else CATALOGUES[source].preprocess(plain))


def _installed_package(source: str | None, name: str) -> WeightsPackage | None:
    """Return the installed package with the weights of a catalogue's network, or None."""
    package = package_of(name) if source == "timm" else None
    return package if package is not None and package.installed else None


def locate(name: str) -> tuple[str | None, str]:
    """Find (catalogue, name in it), or (None, name) for one of NETWORKS, which needs no import and therefore comes first.

    ValueError for an unknown name, with the nearest ones.
    """
    if name in NETWORKS:
        return None, name
    prefix, _, plain = name.partition("/")
    sources = [prefix] if plain and prefix in CATALOGUES else list(CATALOGUES)
    wanted = plain if plain and prefix in CATALOGUES else name
    for source in sources:
        if CATALOGUES[source].has(wanted):
            return source, wanted
    near = [
        f"{source}/{n}"
        for source in sources
        for n in difflib.get_close_matches(wanted, CATALOGUES[source].names(), n=3)
    ]
    near = difflib.get_close_matches(wanted, NETWORKS, n=1) + near
    nearest = f"nearest: {', '.join(near)}; " if near else ""
    raise ValueError(
        f"network {name!r} is unknown: expected one of {', '.join(NETWORKS)}, or a network of torchvision or timm; "
        f"{nearest}torchvision/NAME and timm/NAME select the catalogue"
    )


def _build_builtin(name: str, num_classes: int, image_size: tuple[int, int], args: Mapping[str, Any]) -> nn.Module:
    try:
        return NETWORKS[name](num_classes, image_size=image_size, **args)
    except TypeError as err:
        raise ValueError(f"network {name!r} rejects its arguments {dict(args)}: {err}") from err


def _check_args(name: str, num_classes: int, args: Mapping[str, Any]) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r}: expected a whole number above 0")
    for key in args:
        if not isinstance(key, str):
            raise ValueError(f"network {name!r}: the argument {key!r} is not a text: expected names of arguments")
        if key in _RESERVED or key.startswith(("pretrained", "weights")):
            raise ValueError(
                f"network {name!r}: the argument {key!r} is reserved, as Refract sets the network's weights, input and "
                "outputs; use weights=… and the labels"
            )


# A bundle's metadata is untrusted input: none of its arguments may name a file or a URL to load.
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

_networks: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "resnet20": ResNet20,
    "fastnet": FastNet,
    "cnn": CNN,
    "mlp": MLP,
    "perceptron": Perceptron,
    "rbf": RBFNetwork,
    "linear": LinearOnFeatures,
}

NETWORKS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(_networks)
"""Name → (num_classes, image_size=(height, width), **args) → network: those of Refract and of the loaded plugins."""


def register_network(name: str, factory: Callable[..., nn.Module]) -> None:
    """Add the network of a plugin. PluginError if Refract or another plugin has the name, or if it is `none`."""
    if name == "none":
        raise PluginError("@network: the name 'none' means a model without images; rename the network")
    add_entry("network", _networks, name, factory)
