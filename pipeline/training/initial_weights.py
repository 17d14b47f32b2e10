"""Initialise the weights of a training: loaded or random weights, the head, and initialisations that use training images."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.pipeline.config.config import Config
from refract.pipeline.config.sections import ModelConfig

if TYPE_CHECKING:
    from refract.augment import Preprocess
    from refract.models.classifier import Classifier
    from refract.pipeline.data.manifest import Manifest

log = logging.getLogger(__name__)

MOST_IMAGES = 5000
"""Largest number of training images that a network or an initialisation gets before the first step."""


def loads_weights(config: Config) -> bool:
    """Whether training starts from loaded weights, of the image network or of the text network."""
    from refract.models.multimodal.text_networks import HASHING

    text = config.text
    return config.model.weights != "none" or (text.name not in ("none", HASHING) and text.weights != "none")


def restart_head(model: ModelConfig, network: Any, manifest: "Manifest") -> None:
    """Reset the head if the weights are those of a bundle with the same number of labels but different ones.

    Raises ValueError if the bundle's record lists no labels.
    """
    from refract.models.head import head_of, neutralise_head

    record = Path(model.weights) / "bundle.json"
    if model.weights in ("none", "default") or not record.is_file():
        return
    stored = json.loads(record.read_text("utf-8"))
    labels = stored.get("labels") if isinstance(stored, dict) else None
    if not isinstance(labels, list):
        raise ValueError(f"weights={model.weights!r}: its bundle.json has no list `labels`")
    if len(labels) == len(manifest.labels) and tuple(labels) != manifest.labels:
        for module in head_of(network).modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        neutralise_head(network)
        log.info("the head is reset: the weights were trained for other labels (%s …)", ", ".join(labels[:3]))


def start_weights(config: Config, classifier: "Classifier", preprocess: "Preprocess", manifest: "Manifest") -> None:
    """Apply model.init, and prepare networks that need training images before the first step.

    With loaded weights, model.init applies only to the head, and the network is already prepared.
    """
    from refract.models.head import head_of
    from refract.models.layers.initialisation import initialise
    from refract.models.multimodal.fusion import Reader

    network: Any = classifier.network
    init = config.model.init
    if config.model.weights != "none" and init != "default":
        initialise(head_of(network), init)
    if isinstance(network, Reader):  # text.weights initialises the text network
        network = network.pictures
    if config.model.weights != "none" or network is None:
        return
    prepare = getattr(network, "prepare", None)
    images = _training_images(preprocess, manifest) if prepare is not None or init == "lsuv" else None
    normalised = None if images is None else classifier.normalise(images)
    if init == "lsuv" and getattr(network, "pretrain", "none") != "none":
        raise ValueError("init='lsuv' would overwrite the pre-trained weights; use another init")
    if init not in ("default", "lsuv"):
        initialise(network, init)
    if prepare is not None:
        prepare(normalised)
    if init == "lsuv" and normalised is not None:
        initialise(network, init, normalised[:256])


def _training_images(preprocess: "Preprocess", manifest: "Manifest") -> Any:
    """Return up to MOST_IMAGES training images, evenly spread over the data, uint8 (N, 3, H, W)."""
    import torch

    from refract.pipeline.data.datasets import ImageDataset, collate, targets_of

    samples = [sample for sample in manifest.of("train") if sample.has_image]
    if not samples:
        raise ValueError(
            f"{manifest.source}: the network needs training images before the first step, but the data have none"
        )
    chosen = samples[:: -(-len(samples) // MOST_IMAGES)]
    images = ImageDataset(chosen, preprocess, targets_of(chosen, manifest))
    batch: torch.Tensor = collate([images[i] for i in range(len(images))])["images"]
    return batch
