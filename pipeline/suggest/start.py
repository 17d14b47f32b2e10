"""Check the network and weights that a user names for `refract init`."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from refract.pipeline.config.config import ConfigError
from refract.pipeline.config.model_weights import bundle_folder, check_no_hub_page, is_in_mlflow, is_remote_bundle
from refract.remote.address import is_remote


@dataclass(frozen=True)
class Start:
    """The network and weights that training starts from.

    name, weights, args, head: values of `model.name`, `model.weights`, `model.args` and `model.head`; size: side in pixels of the images
    that the weights were trained on, 0 if unknown; fixed: whether the network accepts only this size; is_in_weights: whether the weights
    name the network.
    """

    name: str
    weights: str
    size: int = 0
    fixed: bool = False
    args: dict[str, Any] = field(default_factory=dict)
    head: str = "linear"
    is_in_weights: bool = False


def check_start(name: str | None, weights: str | None, classes: int) -> Start | None:
    """Return the start that the user names, or None if no option is given. A bundle's folder implies its network.

    ConfigError if a weights file is given without its network, the network is unknown, or the weights do not fit it.
    """
    if name is None and weights in (None, "none"):
        return None
    check_no_hub_page(weights or "none")
    if weights is not None and (is_in_mlflow(weights) or is_remote_bundle(weights)):
        raise ConfigError(
            f"--model.weights {weights}: init reads no model of MLflow and no bundle at a URL; give the folder of a bundle or a run, "
            f"and write {weights} to the config's model.weights afterwards"
        )
    folder = bundle_folder(weights or "none")
    weights = weights if folder is None else str(folder)
    record = _bundle_network(weights)
    if record is not None and name in (None, record["name"]):
        height, width = record["image_size"]
        if height != width:
            raise ConfigError(
                f"--model.weights {weights}: the bundle's network reads {height}×{width} pixels, and init proposes square inputs; "
                "write the config by hand with the bundle's data.image_size"
            )
        args = record["args"]
        start = Start(record["name"], str(weights), height, True, args, args.pop("head", "linear"), is_in_weights=True)
    elif name is None and (network := _timm_network(weights or "none")) is not None:
        start = replace(_named(network, str(weights)), is_in_weights=True)
    elif name is None:
        if weights is not None and not is_remote(weights) and not Path(weights).exists() and weights != "default":
            raise ConfigError(f"--model.weights {weights}: there is no such file or folder; check the path")
        raise ConfigError(
            f"--model.weights {weights}: the network of the weights is missing; add --model.name, such as --model.name resnet18"
        )
    else:
        start = _named(name, weights or "none")
    return _checked(start, classes)


def _timm_network(weights: str) -> str | None:
    """Return the network that config.json next to the weights names, as timm writes it; None without one."""
    from refract.models.pretrained.weights import timm_network
    from refract.models.pretrained.weights_files import weights_folder

    try:
        return None if weights in ("none", "default") else timm_network(weights_folder(weights))
    except ValueError as error:
        raise ConfigError(f"--model.weights {weights}: {error}") from error


def _named(name: str, weights: str) -> Start:
    from refract.models.registry import weights_preprocess

    try:
        trained = weights_preprocess(name, weights) or {}
    except ValueError as error:
        raise ConfigError(f"--model.name: {error}") from error
    if weights == "default" and not trained:
        raise ConfigError(f"--model.weights default: {name} has no pretrained weights to download; use a weights file")
    return Start(name, weights, min(trained.get("image_size", [0])))


def _checked(start: Start, classes: int) -> Start:
    """Return the start with `fixed`, after loading the weights into the network once; not those that training will download."""
    from refract.models.pretrained.packages import package_of
    from refract.models.registry import build

    package = package_of(start.name)
    downloaded = start.weights == "default" and (package is None or not package.installed)
    side, weights = start.size or 224, "none" if downloaded else start.weights
    try:
        network = build(start.name, classes, image_size=(side, side), weights=weights, head=start.head, args=start.args)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"--model.name {start.name} --model.weights {start.weights}: {error}") from error
    positions = ("pos_embed", "pos_embedding", "relative_position_bias_table")
    return replace(start, fixed=start.fixed or any(key.endswith(positions) for key, _ in network.named_parameters()))


def _bundle_network(weights: str | None) -> dict[str, Any] | None:
    """Return the network record of a bundle (name, image_size and args), or None if `weights` is not a bundle's folder."""
    record = Path(weights or "") / "bundle.json"
    if not weights or not record.is_file():
        return None
    try:
        network = json.loads(record.read_text("utf-8"))["network"]
        height, width = map(int, network["image_size"])
        return {"name": str(network["name"]), "image_size": (height, width), "args": dict(network["args"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--model.weights {weights}: its bundle.json does not describe an image network") from error
