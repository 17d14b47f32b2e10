"""What a config asks of `augment` and `models`: the preprocessing, the classifier, its training module."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.config.defaults import learning_rates
from refract.pipeline.config.sections import LossConfig, ModelConfig
from refract.pipeline.training.initial_weights import loads_weights, restart_head, start_weights

if TYPE_CHECKING:
    from refract.augment import Augmenter, Preprocess
    from refract.models.classifier import Classifier, Inputs
    from refract.models.multimodal.tokens import Tokens
    from refract.models.training.lightning_module import ClassifierModule
    from refract.models.training.losses import LossSpec
    from refract.models.training.optimizers import OptimSpec
    from refract.pipeline.data.manifest import Manifest

log = logging.getLogger(__name__)

NO_IMAGES = "none"
"""model.name of a network that reads texts alone."""

FROM_ARGS = (LookupError, ArithmeticError, AttributeError)
"""What else a library's network raises for a wrong value in `model.args`."""


def check_task(config: Config, task: str) -> None:
    """ConfigError for a loss that the task does not have."""
    if task == "multilabel" and config.loss.name in ("cross_entropy", "perceptron"):
        raise ConfigError(
            f"loss.name: {config.loss.name} is for one label an image; the data are multilabel: take auto, bce, focal or mse"
        )


def check_recipe(config: Config, augmenter: "Augmenter", precision: str) -> None:
    """ConfigError for settings that are out of range or do not go together."""
    specs(config)
    if config.loss.consistency and config.text.name != "none":
        raise ConfigError("loss.consistency compares views of images; it does not go with text.name")
    if augmenter.texts and config.text.name == "none":
        log.warning("augment.policy changes texts, which the network does not read (text.name: none)")
    if config.loss.consistency and (augmenter.mixes or not any(op.name == "AugMix" for op in augmenter.policy.ops)):
        raise ConfigError(
            "loss.consistency compares views that AugMix makes: the policy needs AugMix, and neither MixUp nor CutMix"
        )
    if config.optim.sam and precision == "16-mixed":
        raise ConfigError(
            "optim.sam does not go with fp16, whose gradients are scaled; take trainer.precision: bf16 or fp32"
        )
    if config.optim.sam and config.trainer.accumulate > 1:
        raise ConfigError("optim.sam needs the whole step's loss at once: trainer.accumulate: 1")
    model, epochs = config.model, config.trainer.max_epochs
    if model.mode in ("gradual", "linear-then-fine-tune") and model.unfreeze_epochs >= epochs > 1:
        log.warning(
            "only the head is trained: model.unfreeze_epochs (%d) reaches trainer.max_epochs (%d)",
            model.unfreeze_epochs,
            epochs,
        )
    if model.mode == "feature-extract" and model.weights == "none" and reads(config) == {"images"}:
        log.warning(
            "model.mode: feature-extract trains the head alone, and model.weights is none: what is under it stays random"
        )
    if config.loss.teacher is None and config.loss.distill != LossConfig().distill:
        log.warning("loss.distill has no effect without loss.teacher")
    if config.loss.name != "focal" and config.loss.gamma != LossConfig().gamma:
        log.warning("loss.gamma has no effect but with loss.name: focal")
    if not config.loss.penalty and config.loss.l1_ratio:
        log.warning("loss.l1_ratio has no effect without loss.penalty")


def specs(config: Config) -> "tuple[OptimSpec, LossSpec]":
    """What the sections optim and loss say. ConfigError names a key that is out of range."""
    from refract.models.training.losses import LossSpec
    from refract.models.training.optimizers import OptimSpec

    names = {item.name for item in dataclasses.fields(LossSpec)}
    section = "optim"
    try:
        lr, head_lr = learning_rates(config)
        optim = OptimSpec(**dataclasses.asdict(config.optim) | {"lr": lr, "head_lr": head_lr})
        section = "loss"
        loss = LossSpec(**{name: value for name, value in dataclasses.asdict(config.loss).items() if name in names})
    except ValueError as error:
        raise ConfigError(f"{section}.{error}") from error
    return optim, loss


def reads(config: Config) -> frozenset[str]:
    """What the network reads: images, texts, or both."""
    own = {"images": config.model.name != NO_IMAGES, "texts": config.text.name != "none"}
    return frozenset(name for name, there in own.items() if there)


def check_inputs(config: Config, manifest: "Manifest") -> None:
    """DataError for samples of which the network could read nothing."""
    from refract.models.multimodal.tokens import trimmed
    from refract.pipeline.data.manifest import DataError

    own = reads(config)
    lacking = [
        s for s in manifest.samples if not ((s.has_image and "images" in own) or (trimmed(s.text) and "texts" in own))
    ]
    if lacking:
        what = "image" if own == {"images"} else "text" if own == {"texts"} else "image and no text"
        hint = "; text.name: hashing reads texts" if own == {"images"} else ""
        raise DataError(f"{manifest.source}: {len(lacking)} samples have no {what}, as {lacking[0].path}{hint}")
    if "texts" in own and not any(trimmed(sample.text) for sample in manifest.samples):
        raise DataError(f"{manifest.source}: text.name is {config.text.name}, but there are no texts (column `text`)")


def make_preprocess(config: Config) -> "Preprocess":
    """What validation, evaluation and serving do. Mean and std: the config's, else the pretrained weights' own, else ImageNet's."""
    from refract.augment.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

    own = _weights_own(config.model) if config.model.name != NO_IMAGES else {}
    if own and config.data.normalize == "fixed" and not (config.data.mean and config.data.std):
        log.info("images are normalised by the weights' own %s", own.get("normalize", "mean and standard deviation"))
    height, width = config.data.sides()
    return Preprocess(
        height,
        width,
        resize=config.data.resize,
        crop_ratio=config.data.crop_ratio,
        mean=config.data.mean or tuple(own.get("mean", IMAGENET_MEAN)),
        std=config.data.std or tuple(own.get("std", IMAGENET_STD)),
        normalize="channel" if config.data.mean else own.get("normalize", "channel"),
        color_profile=config.data.color_profile,
    )


def measured(config: Config, preprocess: "Preprocess", manifest: "Manifest") -> tuple["Preprocess", dict[str, Any]]:
    """(preprocess with the normalisation that the config asks for, the arrays of the classifier's first layer for it).

    Those of a bundle that training begins from are its own; else they are measured on the training images as the network sees them
    without augmentation, in one pass. ConfigError for whitening of large ones.
    """
    import torch

    from refract.augment.statistics import measure
    from refract.models.pretrained.weights import folder_arrays
    from refract.pipeline.data.datasets import ImageDataset, targets_of

    if config.data.normalize == "fixed":
        if preprocess.normalize == "channel":
            return preprocess, {}
        try:
            return preprocess, folder_arrays(config.model.weights, preprocess.normalize)
        except (ValueError, OSError) as error:
            raise ConfigError(f"model: {_line(error)}") from error
    samples = [sample for sample in manifest.of("train") if sample.has_image]
    images = ImageDataset(samples, preprocess, targets_of(samples, manifest))
    kind = "channel" if config.data.normalize == "data" else config.data.normalize
    try:
        found = measure((images.pixels(i) for i in range(len(images))), kind)
    except ValueError as error:
        raise ConfigError(f"data.normalize: {error}") from error
    arrays = {"mean_image": found.mean_image, "whitening": found.whitening}
    mean, std = _three(found.mean), _three(found.std)
    log.info("measured on %d training images: mean %s, std %s", len(samples), mean, std)
    return (
        dataclasses.replace(preprocess, mean=mean, std=std, normalize=kind),
        {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None},
    )


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (round(float(value), 6) for value in values)
    return red, green, blue


def make_module(
    config: Config, manifest: "Manifest", augmenter: "Augmenter", preprocess: "Preprocess", arrays: Mapping[str, Any]
) -> "tuple[ClassifierModule, dict[str, Any] | None]":
    """(the module of the classifier as training begins with it, what a bundle says of the network that reads texts). ConfigError for what
    a network or a spec refuses."""
    from refract.models.classifier import Classifier
    from refract.models.training.activation_checkpointing import recompute_activations
    from refract.models.training.lightning_module import ClassifierModule
    from refract.models.training.losses import balanced_weights

    model, count = config.model, len(manifest.labels)
    optim, loss = specs(config)
    try:
        network, tokens, text = _network(config, count)
        classifier = Classifier(
            network,
            tokens=tokens,
            mean=preprocess.mean,
            std=preprocess.std,
            normalize=preprocess.normalize,
            image_size=config.data.sides(),
            **arrays,
        )
        if text is None:
            restart_head(config, network, manifest)
        start_weights(config, classifier, preprocess, manifest)
    except (ValueError, OSError, TypeError, RuntimeError, MemoryError, *FROM_ARGS) as error:
        raise ConfigError(f"model: {_line(error)}") from error
    classifier.frozen_norms = bool(model.frozen_norms)
    teacher = _teacher(config, manifest, classifier)
    for what, own in (("model.name: " + model.name, classifier), (f"loss.teacher: {config.loss.teacher}", teacher)):
        if own is not None:
            _check_runs(config, own, what, manifest.labels)
    if config.trainer.gradient_checkpointing:
        try:
            recompute_activations(classifier.network)
        except ValueError as error:
            raise ConfigError(f"trainer.gradient_checkpointing: {error}") from error
    weights = (
        balanced_weights(list(manifest.counts("train").values())) if config.loss.class_weights == "balanced" else None
    )
    module = ClassifierModule(
        classifier,
        task=manifest.task,
        num_classes=count,
        optim=optim,
        loss=loss,
        mix=augmenter.mix if augmenter.mixes else None,
        channels_last=all(
            parameter.ndim < 5 for parameter in classifier.parameters()
        ),  # it has no form of three dimensions
        class_weights=weights,
        mode=model.mode,
        unfreeze_epochs=model.unfreeze_epochs,
        teacher=teacher,
        start_size=config.trainer.start_size,
    )
    return module, text


def _network(config: Config, count: int) -> "tuple[Any, Tokens | None, dict[str, Any] | None]":
    """(the network, what makes tokens for it, what a bundle says of that)."""
    from refract.models.factory import text_record
    from refract.models.head import neutralise_head
    from refract.models.multimodal.fusion import Reader
    from refract.models.multimodal.text_networks import make_text_part
    from refract.models.registry import build

    model, text = config.model, config.text
    how: dict[str, Any] = {"image_size": config.data.sides(), "weights": model.weights, "args": model.args}
    if text.name == "none":
        return build(model.name, count, head=model.head, **how), None, None
    own: dict[str, Any] = {
        "weights": text.weights,
        "max_length": text.max_length,
        "pooling": text.pooling,
        "args": text.args,
    }
    part, tokens, reading = make_text_part(text.name, **own)
    images = None if model.name == NO_IMAGES else build(model.name, count, **how)
    joined: dict[str, Any] = {"fusion": text.fusion, "width": text.width}
    drops: dict[str, Any] = {"drop_image": text.drop_image, "drop_text": text.drop_text}
    reader = Reader(images, reading, count, head=model.head, **joined, **drops)
    if loads_weights(config):
        neutralise_head(reader)
    return reader, tokens, text_record(part, joined)


def _check_runs(config: Config, classifier: "Classifier", what: str, classes: Sequence[str]) -> None:
    """ConfigError where the classifier cannot take a batch of the images that training brings, at the size of any epoch."""
    import torch

    from refract.models.training.activation_checkpointing import statistics_kept
    from refract.models.training.lightning_module import size_at

    full, epochs, count = config.data.sides(), config.trainer.max_epochs, len(classes)
    sizes = dict.fromkeys(size_at(epoch, epochs, config.trainer.start_size, full) for epoch in range(epochs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), statistics_kept(classifier.train()):
        for size in {**sizes, full: None}:
            try:
                logits = classifier(*_blank_inputs(classifier, min(2, config.data.batch_size), size))
                if not isinstance(logits, torch.Tensor) or logits.shape != (min(2, config.data.batch_size), count):
                    found = tuple(getattr(logits, "shape", ()))
                    raise ValueError(
                        f"it answers with shape {found} where one number for each of {count} labels is needed"
                    )
            except (RuntimeError, AssertionError, ValueError, TypeError, *FROM_ARGS) as error:
                hint = ""
                if size != full:
                    hint = " of some epochs (trainer.start_size; it needs 1.0)"
                elif "more than 1 value per channel" in str(error):
                    hint = ": its batch norms need a data.batch_size of at least 2"
                raise ConfigError(
                    f"{what} cannot train on {min(2, config.data.batch_size)} images of {size[0]}×{size[1]} pixels{hint} ({_line(error)})"
                ) from error


def _blank_inputs(classifier: "Classifier", count: int, size: tuple[int, int]) -> "Inputs":
    import torch

    images = torch.zeros(count, 3, *size) if "images" in classifier.reads else None
    if "texts" not in classifier.reads:
        return (images,)
    return images, torch.ones(count, 4, dtype=torch.int32), torch.ones(count, dtype=torch.bool)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _teacher(config: Config, manifest: "Manifest", student: "Classifier") -> "Classifier | None":
    """The classifier of the bundle to learn from. ConfigError where its labels, task or image size are others, or it reads what the
    student does not, or texts by other tokens."""
    if config.loss.teacher is None:
        return None
    from refract.models.bundle.bundle import BundleError, load_bundle

    try:
        bundle = load_bundle(config.loss.teacher)
        classifier = bundle.classifier()
    except BundleError as error:
        raise ConfigError(f"loss.teacher: {error}") from error
    where = f"loss.teacher: {config.loss.teacher}"
    if more := classifier.reads - student.reads:
        raise ConfigError(f"{where} reads {' and '.join(sorted(more))}, which this training does not")
    facts: list[tuple[str, Any, Any]] = [
        ("task", bundle.info.task, manifest.task),
        ("labels", bundle.info.labels, manifest.labels),
    ]
    if "images" in classifier.reads:
        facts.append(("image size", tuple(bundle.info.network["image_size"]), config.data.sides()))
    for what, own, ours in facts:
        if own != ours:
            raise ConfigError(f"{where} has the {what} {own}, this training {ours}")
    if classifier.tokens is not None and classifier.tokens != student.tokens:
        raise ConfigError(
            f"{where} makes other tokens of a text than this training: take its text.name, text.max_length and text.args here"
        )
    return classifier


def _weights_own(model: ModelConfig) -> Mapping[str, Any]:
    from refract.models.registry import weights_preprocess

    try:
        return weights_preprocess(model.name, model.weights) or {}
    except ValueError as error:
        raise ConfigError(f"model.name: {error}") from error
