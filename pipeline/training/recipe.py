"""Check what a training combines, before it is built: values that exclude each other, and settings without effect."""

import logging
from typing import TYPE_CHECKING

from refract.models.training.losses import LOSSES, losses_of
from refract.models.training.specs import LossSpec
from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.config.defaults import why_no_probe

if TYPE_CHECKING:
    from refract.augment import Augmenter

log = logging.getLogger(__name__)


def check_task(loss: LossSpec, task: str) -> None:
    """Raise ConfigError for a loss that does not fit the task."""
    if loss.name not in losses_of(task):
        raise ConfigError(
            f"loss.name: {loss.name} does not support the task {task} of the data; set one of {', '.join(losses_of(task))}"
        )


def check_recipe(config: Config, augmenter: "Augmenter", precision: str) -> None:
    """Raise ConfigError for values that are out of range or incompatible. Warn about settings without effect."""
    if config.loss.consistency and config.text.reads_texts:
        raise ConfigError(
            "loss.consistency: compares views of images, so it cannot be combined with text.name; set loss.consistency: 0"
        )
    if augmenter.texts and not config.text.reads_texts:
        log.warning("augment.policy has text ops without effect: text.name is none, so the network reads no texts")
    if config.loss.consistency and (augmenter.mixes or not any(op.name == "AugMix" for op in augmenter.policy.ops)):
        raise ConfigError(
            "loss.consistency: compares views made by AugMix; the policy needs AugMix, without MixUp and CutMix"
        )
    if config.loss.consistency and config.data.decode_on == "device":
        raise ConfigError(
            "data.decode_on: device makes one view of each image, and loss.consistency compares several; set data.decode_on: workers"
        )
    if config.optim.sam and precision == "16-mixed":
        raise ConfigError(
            "optim.sam: cannot be combined with fp16, whose gradients are scaled; set trainer.precision: bf16 or fp32"
        )
    if config.optim.sam and config.trainer.accumulate > 1:
        raise ConfigError(
            f"optim.sam: needs the loss of the whole step at once, got trainer.accumulate: {config.trainer.accumulate}; "
            "set trainer.accumulate: 1"
        )
    _check_mode(config)
    if config.loss.teacher is None and config.loss.distill != LossSpec().distill:
        log.warning("loss.distill has no effect without loss.teacher")
    with_gamma = [name for name, loss in LOSSES.items() if "gamma" in loss.needs]
    if config.loss.name not in with_gamma and config.loss.gamma != LossSpec().gamma:
        log.warning("loss.gamma has no effect without loss.name: %s", " or ".join(with_gamma))
    if not config.loss.penalty and config.loss.l1_ratio:
        log.warning("loss.l1_ratio has no effect without loss.penalty")


def _check_mode(config: Config) -> None:
    """Raise ConfigError for settings that `model.mode` excludes. Warn about a mode without effect."""
    model, epochs = config.model, config.trainer.max_epochs
    unfreeze_epochs = model.unfreeze_epochs or 0
    if model.mode in ("gradual", "linear-then-fine-tune") and unfreeze_epochs >= epochs > 1:
        log.warning(
            "only the head is trained: model.unfreeze_epochs (%d) is not below trainer.max_epochs (%d)",
            unfreeze_epochs,
            epochs,
        )
    if model.mode == "gradual" and not unfreeze_epochs:
        raise ConfigError(
            "model.unfreeze_epochs: 0 with gradual trains all layers at once; set model.mode: fine-tune, or 1"
        )
    if model.starts_from_probe and (reason := why_no_probe(config)) is not None:
        raise ConfigError(
            f"model.unfreeze_epochs: 0 fits the head on embeddings, but {reason}; set model.unfreeze_epochs: 1"
        )
    if model.on_embeddings:
        _check_on_embeddings(config)
    frozen = model.mode == "feature-extract" or model.on_embeddings
    if frozen and model.weights == "none" and config.reads == {"images"}:
        log.warning(
            f"model.mode: {model.mode} trains only the head; with model.weights: none the backbone stays random"
        )
    if model.mode == "lora" and not config.loads_weights:
        raise ConfigError("model.mode: lora adapts loaded weights; set model.weights, or model.mode: fine-tune")
    if config.trainer.quantization_aware and (model.mode in ("lora", "feature-extract") or model.on_embeddings):
        raise ConfigError(
            f"trainer.quantization_aware: true adapts all layers, which model.mode: {model.mode} does not train; set model.mode: fine-tune"
        )


def _check_on_embeddings(config: Config) -> None:
    """Raise ConfigError for settings that a head fitted on embeddings excludes."""
    mode = config.model.mode
    if config.model.head not in ("linear", config.model.head_name):
        raise ConfigError(
            f"model.head: {config.model.head} cannot be combined with model.mode: {mode}; set model.head: linear"
        )
    if config.reads != {"images"}:
        raise ConfigError(f"model.mode: {mode} needs a network that reads images alone; set text.name: none")
    if config.trainer.devices > 1:
        raise ConfigError(
            f"trainer.devices: {config.trainer.devices} with model.mode: {mode}, which fits in one process; set 1"
        )
    if config.loss.teacher is not None:
        raise ConfigError(f"loss.teacher: has no effect with model.mode: {mode}; set loss.teacher: null")
    log.info(
        "model.mode: %s fits the head on embeddings of plain images; augment.policy, optim and trainer.max_epochs have no effect",
        mode,
    )


def check_ranks(config: Config, val_samples: int, ranks: int) -> None:
    """Raise ConfigError for settings that several ranks exclude, and for fewer validation samples than ranks."""
    if ranks == 1:
        if config.trainer.strategy == "fsdp":
            log.warning("trainer.strategy: fsdp has no effect with one rank; start several with `refract torchrun`")
        return
    if config.model.on_embeddings:
        raise ConfigError(
            f"model.mode: {config.model.mode} fits the head in one process, got {ranks} ranks; use `refract train` without torchrun"
        )
    if val_samples < ranks:
        raise ConfigError(
            f"{ranks} ranks need a validation sample each, got {val_samples}; raise data.val_fraction, or start fewer ranks"
        )
    if config.trainer.strategy != "fsdp":
        return
    for key, value, accepted in (
        ("model.mode", config.model.mode, "fine-tune"),
        ("optim.sam", config.optim.sam, 0),
        ("loss.penalty", config.loss.penalty, 0),
        ("trainer.compile", config.trainer.compile, False),
    ):
        if value != accepted:
            raise ConfigError(
                f"{key}: {value} needs the whole weights on each rank; set {key}: {accepted}, or trainer.strategy: ddp"
            )
    if config.optim.name == "muon":
        raise ConfigError("optim.name: muon needs whole matrices; set optim.name: adamw, or trainer.strategy: ddp")
