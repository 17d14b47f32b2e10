"""The weights that training starts from: loaded or random, the head's, and what depends on the training images."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refract.pipeline.config.config import Config

if TYPE_CHECKING:
    from refract.augment import Preprocess
    from refract.models.classifier import Classifier
    from refract.pipeline.data.manifest import Manifest

log = logging.getLogger(__name__)

SHOWN_TO_NETWORK = 5000
"""Training images that a network or an initialisation may see before the first step."""


def loads_weights(config: Config) -> bool:
    """Whether training starts from loaded weights, of images or of texts."""
    from refract.models.multimodal.text_networks import HASHING

    text = config.text
    return config.model.weights != "none" or (text.name not in ("none", HASHING) and text.weights != "none")


def restart_head(config: Config, network: Any, manifest: "Manifest") -> None:
    """Start the head afresh where the bundle that the weights come from has other labels, though as many."""
    from refract.models.head import head_of, neutralise_head

    record = Path(config.model.weights) / "bundle.json"
    if config.model.weights in ("none", "default") or not record.is_file():
        return
    stored = json.loads(record.read_text("utf-8"))
    labels = stored.get("labels") if isinstance(stored, dict) else None
    if not isinstance(labels, list):
        raise ValueError(f"weights={config.model.weights!r}: its bundle.json has no list of labels")
    if len(labels) == len(manifest.labels) and tuple(labels) != manifest.labels:
        for module in head_of(network).modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        neutralise_head(network)
        log.info("the weights' head was trained for other labels (%s …); a new one replaces it", ", ".join(labels[:3]))


def start_weights(config: Config, classifier: "Classifier", preprocess: "Preprocess", manifest: "Manifest") -> None:
    """Apply model.init, and show the network training images where it needs them before the first step.

    With loaded weights, model.init applies to the head alone, and the network has seen its images already.
    """
    from refract.models.head import head_of
    from refract.models.layers.initialisation import initialise
    from refract.models.multimodal.fusion import Reader

    network: Any = classifier.network
    init = config.model.init
    if config.model.weights != "none" and init != "default":
        initialise(head_of(network), init)
    if isinstance(network, Reader):  # text.weights initialises what reads texts
        network = network.pictures
    if config.model.weights != "none" or network is None:
        return
    prepare = getattr(network, "prepare", None)
    images = _some(preprocess, manifest) if prepare is not None or init == "lsuv" else None
    normalised = None if images is None else classifier.normalise(images)
    if init == "lsuv" and getattr(network, "pretrain", "none") != "none":
        raise ValueError("init='lsuv' would undo the pre-training; take another init")
    if init not in ("default", "lsuv"):
        initialise(network, init)
    if prepare is not None:
        prepare(normalised)
    if init == "lsuv" and normalised is not None:
        initialise(network, init, normalised[:256])


def _some(preprocess: "Preprocess", manifest: "Manifest") -> Any:
    """Up to SHOWN_TO_NETWORK training images, spread over the data, uint8 (N, 3, H, W)."""
    import torch

    from refract.pipeline.data.datasets import ImageDataset, collate, targets_of

    samples = [sample for sample in manifest.of("train") if sample.has_image]
    if not samples:
        raise ValueError(
            f"{manifest.source}: the network needs training images before the first step, and there are none"
        )
    chosen = samples[:: -(-len(samples) // SHOWN_TO_NETWORK)]
    images = ImageDataset(chosen, preprocess, targets_of(chosen, manifest))
    batch: torch.Tensor = collate([images[i] for i in range(len(images))])["images"]
    return batch
