"""Initialise the weights of a training: loaded or random weights, the head, and initialisations that use training images."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from refract.pipeline.config.sections import ModelConfig

if TYPE_CHECKING:
    from refract.augment import Preprocess
    from refract.models.classifier import Classifier
    from refract.pipeline.data.manifest import Manifest
    from refract.pipeline.training.source_model import SourceModel

log = logging.getLogger(__name__)

MOST_IMAGES = 5000
"""Largest number of training images that a network or an initialisation gets before the first step."""


def head_rows(source: "SourceModel | None", labels: Sequence[str]) -> list[int | None] | None:
    """Return for each label its row in the head of the model that training starts from, None for a new label.

    None without such a model, and if it has the same labels in the same order.
    """
    if source is None or source.bundle.info.labels == tuple(labels):
        return None
    known = {label: row for row, label in enumerate(source.bundle.info.labels)}
    rows = [known.get(label) for label in labels]
    new = [label for label, row in zip(labels, rows, strict=True) if row is None]
    log.info("the head keeps %d of the model's %d classes", len(labels) - len(new), len(known))
    if new:
        more = f" and {len(new) - 5} more" if len(new) > 5 else ""
        log.info("the head gets new rows for %s%s", ", ".join(new[:5]), more)
    return rows


def start_weights(model: ModelConfig, classifier: "Classifier", preprocess: "Preprocess", manifest: "Manifest") -> None:
    """Apply model.init, and prepare networks that need training images before the first step.

    With loaded weights, model.init applies only to the head, and the network is already prepared.
    """
    from refract.models.head import head_of
    from refract.models.layers.initialisation import initialise
    from refract.models.multimodal.fusion import Reader

    network: Any = classifier.network
    init = model.init
    if model.weights != "none" and init != "default":
        initialise(head_of(network), init)
    if isinstance(network, Reader):  # text.weights initialises the text network
        network = network.images
    if model.weights != "none" or network is None:
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
