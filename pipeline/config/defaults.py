"""The values that replace null in a config: learning rates by optimiser and training mode, and frozen batch norms."""

import os
import re

from refract.models.training.optimizers import OPTIMIZERS
from refract.pipeline.config.config import Config
from refract.pipeline.config.model_weights import names_model

FROM_SCRATCH, FINE_TUNE, HEAD_ALONE = 2e-3, 3e-4, 3e-3
"""Peak learning rates of AdamW for random weights, for loaded weights, and for a new head on frozen layers. To compare other values, run
`python -m benchmarks.transfer --settings`."""

CONVOLUTIONAL = 5e-3
"""Peak learning rate of Adam and AdamW for random weights of the networks that MEASURED names. It gave 5 to 7 points more than
FROM_SCRATCH on each of three data sets; a ViT lost 8 (`benchmarks.from_scratch`, one seed)."""
MEASURED = re.compile(r"lenet5|cnn|mlp|(timm/)?(wide_)?resne[tx][\w.]*")
"""Small networks of Refract, and ResNets of Refract, torchvision and timm."""

UNFROZEN = 1e-4
"""Peak learning rate of AdamW for loaded layers that are trained after the head alone. At FINE_TUNE, one seed of three diverged in both
such modes (`benchmarks.transfer`, 128 pixels): accuracy 0.77 instead of 0.89."""

LORA = 1e-3
"""Peak learning rate of AdamW for adapters of LoRA, a few times that of full fine-tuning, as their best learning rate is higher (Biderman
et al. 2024, arXiv:2405.09673)."""


def filled(config: Config) -> Config:
    """Return a copy with values in place of None in `optim` and `model`, so that a run stores what it used.

    Loaded batch norms keep their statistics. With those of small, augmented batches, fine-tuning EfficientNet-Lite0 on 245 photos at 128
    pixels ended 4 points lower (one seed, 4 epochs, 153 validation images); at 224 pixels linear-then-fine-tune differed by 1.
    The weights of a bundle or a run are the exception: the head is not new, and the statistics may come from a short training.
    """
    model, (lr, head_lr) = config.model, learning_rates(config)
    unfreeze_epochs = int(why_no_probe(config) is not None) if model.mode == "linear-then-fine-tune" else 1
    frozen_norms = model.weights != "none" and not names_model(model.weights)
    return config.changed(
        {
            "optim.lr": lr,
            "optim.head_lr": head_lr,
            "model.unfreeze_epochs": unfreeze_epochs if model.unfreeze_epochs is None else model.unfreeze_epochs,
            "model.frozen_norms": frozen_norms if model.frozen_norms is None else model.frozen_norms,
        }
    )


def why_no_probe(config: Config) -> str | None:
    """Return why `linear-then-fine-tune` cannot fit its head on embeddings, as a key and what it would need, None if it can.

    The head of a bundle or a run is fitted already. With several ranks, one would embed the images while the others wait.
    `refract.pipeline.features.training.why_not_fitted` checks the network.
    """
    if names_model(config.model.weights):
        return f"model.weights: {config.model.weights} has a head already"
    if config.model.head != "linear":
        return f"model.head: {config.model.head} is not linear"
    if config.text.reads_texts:
        return f"text.name: {config.text.name} reads texts, and embeddings are those of images alone"
    if config.trainer.devices > 1:
        return f"trainer.devices: {config.trainer.devices} is not 1"
    if "LOCAL_WORLD_SIZE" in os.environ and (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        return f"torchrun started {ranks} processes"
    return None


def learning_rates(config: Config) -> tuple[float, float]:
    """Return (optim.lr, optim.head_lr), with the default in place of None."""
    optim, model = config.optim, config.model
    head_only, loaded = model.mode == "feature-extract" or model.on_embeddings, config.loads_weights
    unfreezes = model.mode in ("gradual", "linear-then-fine-tune")
    loaded_rate = LORA if model.mode == "lora" else UNFROZEN if unfreezes else FINE_TUNE
    measured = optim.name in ("adam", "adamw") and not config.text.reads_texts and MEASURED.fullmatch(model.name)
    random_rate = CONVOLUTIONAL if measured else FROM_SCRATCH
    adamw = HEAD_ALONE if head_only else loaded_rate if loaded else random_rate
    new_head = loaded and not head_only and not names_model(model.weights)
    lr = OPTIMIZERS[optim.name].times_adamw * adamw if optim.lr is None else optim.lr
    # The new head learns at HEAD_ALONE in every mode (discriminative rates: Howard & Ruder 2018, arXiv:1801.06146, section 3.2).
    head_lr = (round(HEAD_ALONE / loaded_rate, 3) if new_head else 1.0) if optim.head_lr is None else optim.head_lr
    return lr, head_lr
