"""The smaller networks that a shrink trains, and the config of each training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from refract.errors import InputError
from refract.models.bundle.bundle import Bundle
from refract.models.registry import build, locate
from refract.pipeline.config.config import Config
from refract.pipeline.config.sections import ModelConfig
from refract.pipeline.suggest.backbones import has_weights

FRACTIONS = (0.75, 0.5)
"""Input sides of the bundle's own network that are tried by default, as fractions of the bundle's sides."""

SMALL_IMAGES = 64
"""The longest shorter side in pixels of the networks in FROM_SCRATCH."""

FROM_SCRATCH = ("resnet20", "cnn", "lenet5")
PRETRAINED = ("timm/tf_efficientnet_lite0", "mobilenet_v3_small", "resnet18")
"""Other networks that are tried by default, for small images and for larger ones. Of PRETRAINED, those whose weights are on this machine,
else its second one with random weights."""

SMALLEST_SIDE = 8


class ShrinkError(InputError):
    """Raised for a bundle, an option or a folder that cannot be used. The message names it and what to do instead."""


@dataclass(frozen=True)
class Candidate:
    """A network to train. size: (height, width) in pixels; weights: value of model.weights; args, head: of model.args and model.head."""

    network: str
    size: tuple[int, int]
    weights: str
    args: dict[str, Any] = field(default_factory=dict)
    head: str = "linear"

    @property
    def name(self) -> str:
        """The name of its run's folder."""
        return f"{self.network.replace('/', '.')}-{min(self.size)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self) | {"size": list(self.size)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the candidate from the result of `to_dict`."""
        return cls(**{**values, "size": tuple(values["size"])})


def default_candidates(bundle: Bundle, model: ModelConfig) -> list[Candidate]:
    """Return the bundle's network at smaller sizes, and small other networks with fewer parameters than it has."""
    size = _size_of(bundle)
    step = 32 if min(size) >= 128 else 8
    sides = dict.fromkeys(round(min(size) * fraction / step) * step for fraction in FRACTIONS)
    smaller = [_scaled(size, side) for side in sides if SMALLEST_SIDE <= side < min(size)]
    scaled_candidates = [
        candidate for smaller_size in smaller if (candidate := _own(bundle, model, smaller_size)) is not None
    ]
    names: Sequence[str] = FROM_SCRATCH
    if min(size) > SMALL_IMAGES:
        names = [name for name in PRETRAINED if has_weights(name)] or PRETRAINED[1:2]
    largest = _parameters(bundle.classifier().network)
    other = [_other(name, size) for name in names if name != bundle.info.network["name"]]
    count = len(bundle.info.labels)
    return scaled_candidates + [candidate for candidate in other if 0 < _size_in_parameters(candidate, count) < largest]


def named_candidates(bundle: Bundle, model: ModelConfig, entries: Sequence[str]) -> list[Candidate]:
    """Return the candidates of `--networks`: NAME or NAME:PIXELS, the shorter side. ShrinkError for an entry that cannot be built."""
    return list({(candidate := _named(bundle, model, entry)).name: candidate for entry in entries}.values())


def _named(bundle: Bundle, model: ModelConfig, entry: str) -> Candidate:
    size = _size_of(bundle)
    name, _, pixels = entry.partition(":")
    if pixels and not (pixels.isdecimal() and SMALLEST_SIDE <= int(pixels) <= min(size)):
        raise ShrinkError(
            f"--networks {entry}: {pixels} is not a number of pixels in {SMALLEST_SIDE}…{min(size)}, the bundle's shorter side"
        )
    size = _scaled(size, int(pixels)) if pixels else size
    if name == bundle.info.network["name"]:
        if size == _size_of(bundle):
            raise ShrinkError(
                f"--networks {entry}: is the bundle's network itself; add a smaller size, as in {name}:PIXELS"
            )
        candidate = _own(bundle, model, size)
        if candidate is None:
            raise ShrinkError(f"--networks {entry}: the network cannot be built for {size[0]}×{size[1]} pixels")
        return candidate
    try:
        locate(name)
        candidate = _other(name, size)
        build(name, len(bundle.info.labels), image_size=size)
    except (ValueError, RuntimeError) as err:
        raise ShrinkError(f"--networks {entry}: {err}") from err
    return candidate


def config_of(candidate: Candidate, bundle: Bundle, config: Config, runs: str) -> Config:
    """Return the config of the candidate's training: the bundle's, with distillation from it. runs: the folder of the run's folder.

    The learning rates stay only if both trainings start from random weights, for which they were chosen; else they are the defaults.
    """
    same_network = candidate.network == bundle.info.network["name"]
    changes: dict[str, Any] = {
        "data.image_size": candidate.size, "model.name": candidate.network, "model.weights": candidate.weights,
        "model.args": candidate.args, "model.head": candidate.head, "model.mode": "fine-tune", "model.unfreeze_epochs": None,
        "model.frozen_norms": None, "loss.teacher": str(bundle.path.resolve()), "trainer.devices": 1, "trainer.strategy": "ddp",
        "trainer.runs_dir": runs, "trainer.run_name": candidate.name, "trainer.copy_to": None, "tracking.model_name": None,
    }  # fmt: skip
    if not (candidate.weights == config.model.weights == "none" and config.model.mode == "fine-tune"):
        changes |= {"optim.lr": None, "optim.head_lr": None}
    if not same_network:
        changes |= {"model.init": "default"}
    if candidate.weights == "default":
        changes |= {"data.mean": None, "data.std": None}  # those of the weights
    return config.changed(changes)


def _own(bundle: Bundle, model: ModelConfig, size: tuple[int, int]) -> Candidate | None:
    """Return the bundle's network at another size, which starts from the bundle if its weights fit; None if it cannot be built."""
    network = bundle.info.network["name"]
    args, head = dict(model.args), model.head
    try:
        built = build(network, len(bundle.info.labels), image_size=size, head=head, args=args)
    except (ValueError, RuntimeError):
        return None
    expected = {f"network.{key}": tensor.shape for key, tensor in built.state_dict().items()}
    given = {key: tensor.shape for key, tensor in bundle.weights().items() if key.startswith("network.")}
    without = "default" if model.weights == "default" else "none"
    return Candidate(network, size, str(bundle.path.resolve()) if expected == given else without, args, head)


def _other(name: str, size: tuple[int, int]) -> Candidate:
    return Candidate(name, size, "default" if has_weights(name) else "none")


def _size_in_parameters(candidate: Candidate, count: int) -> int:
    """Return the number of parameters, 0 if the network cannot be built for its size."""
    try:
        return _parameters(build(candidate.network, count, image_size=candidate.size))
    except (ValueError, RuntimeError):
        return 0


def _parameters(network: Any) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _size_of(bundle: Bundle) -> tuple[int, int]:
    height, width = bundle.info.network["image_size"]
    return height, width


def _scaled(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Scale the size to a shorter side."""
    factor = shorter / min(size)
    height, width = (max(SMALLEST_SIDE, math.floor(side * factor + 0.5)) for side in size)
    return height, width
