"""Build from a config: the preprocessing, the classifier and its training module."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from refract.models.training.losses import LOSSES, losses_of
from refract.models.training.specs import LossSpec
from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.config.defaults import why_no_probe
from refract.pipeline.config.sections import ModelConfig
from refract.pipeline.training.initial_weights import head_rows, loads_weights, start_weights

if TYPE_CHECKING:
    from refract.augment import Augmenter, Preprocess
    from refract.models.classifier import Classifier, Inputs
    from refract.models.multimodal.tokens import Tokens
    from refract.models.training.lightning_module import ClassifierModule
    from refract.pipeline.data.manifest import Manifest
    from refract.pipeline.training.source_model import SourceModel

log = logging.getLogger(__name__)

NO_IMAGES = "none"
"""The `model.name` of a network that reads only texts."""

FROM_ARGS = (LookupError, ArithmeticError, AttributeError)
"""Further exceptions of third-party networks for a wrong value in `model.args`."""

LARGEST_STRETCH = 1.05
"""Largest ratio of the aspect ratios of teacher and student. The sides of a smaller size are rounded."""


def check_task(loss: LossSpec, task: str) -> None:
    """Raise ConfigError for a loss that does not fit the task."""
    if loss.name not in losses_of(task):
        raise ConfigError(
            f"loss.name: {loss.name} does not support the task {task} of the data; set one of {', '.join(losses_of(task))}"
        )


def check_recipe(config: Config, augmenter: "Augmenter", precision: str) -> None:
    """Raise ConfigError for values that are out of range or incompatible. Warn about settings without effect."""
    if config.loss.consistency and config.text.name != "none":
        raise ConfigError(
            "loss.consistency: compares views of images, so it cannot be combined with text.name; set loss.consistency: 0"
        )
    if augmenter.texts and config.text.name == "none":
        log.warning("augment.policy has text ops without effect: text.name is none, so the network reads no texts")
    if config.loss.consistency and (augmenter.mixes or not any(op.name == "AugMix" for op in augmenter.policy.ops)):
        raise ConfigError(
            "loss.consistency: compares views made by AugMix; the policy needs AugMix, without MixUp and CutMix"
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
    if frozen and model.weights == "none" and reads(config) == {"images"}:
        log.warning(
            f"model.mode: {model.mode} trains only the head; with model.weights: none the backbone stays random"
        )
    if model.mode == "lora" and not loads_weights(config):
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
    if reads(config) != {"images"}:
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


def reads(config: Config) -> frozenset[str]:
    """Return the modalities that the network reads: `images`, `texts`, or both."""
    modalities = {"images": config.model.name != NO_IMAGES, "texts": config.text.name != "none"}
    return frozenset(name for name, is_read in modalities.items() if is_read)


def check_inputs(config: Config, manifest: "Manifest") -> None:
    """Raise DataError for samples without any modality that the network reads."""
    from refract.models.multimodal.tokens import trimmed
    from refract.pipeline.data.manifest import DataError

    modalities = reads(config)
    empty = [
        s
        for s in manifest.samples
        if not ((s.has_image and "images" in modalities) or (trimmed(s.text) and "texts" in modalities))
    ]
    if empty:
        missing = "image" if modalities == {"images"} else "text" if modalities == {"texts"} else "image and no text"
        hint = "; to read texts, set text.name: hashing" if modalities == {"images"} else ""
        raise DataError(f"{manifest.source}: {len(empty)} samples have no {missing}, such as {empty[0].path}{hint}")
    if "texts" in modalities and not any(trimmed(sample.text) for sample in manifest.samples):
        raise DataError(
            f"{manifest.source}: the data have no texts (column `text`), but text.name is {config.text.name}; "
            "set text.name: none"
        )


def make_preprocess(config: Config) -> "Preprocess":
    """Build the preprocessing of validation, evaluation and serving.

    Mean and std come from the config, else from the pretrained weights, else from ImageNet.
    """
    from refract.augment.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

    recorded = _weights_preprocess(config.model) if config.model.name != NO_IMAGES else {}
    if recorded and config.data.normalize == "fixed" and not (config.data.mean and config.data.std):
        kind = recorded.get("normalize", "mean and standard deviation")
        log.info("images are normalised by the %s recorded with the weights", kind)
    height, width = config.data.sides()
    return Preprocess(
        height,
        width,
        resize=config.data.resize,
        crop_ratio=config.data.crop_ratio,
        mean=config.data.mean or tuple(recorded.get("mean", IMAGENET_MEAN)),
        std=config.data.std or tuple(recorded.get("std", IMAGENET_STD)),
        normalize="channel" if config.data.mean else recorded.get("normalize", "channel"),
        color_profile=config.data.color_profile,
        interpolation=config.data.interpolation,
    )


def with_normalisation(
    config: Config, preprocess: "Preprocess", manifest: "Manifest"
) -> tuple["Preprocess", dict[str, Any]]:
    """Return (preprocess with the configured normalisation, the normalisation arrays of the classifier's first layer).

    For `data.normalize: fixed` the arrays are those of the bundle that training starts from. Otherwise one pass measures them on the
    training images, preprocessed without augmentation. Raises ConfigError where images are too large for whitening.
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
        statistics = measure((images.pixels(i) for i in range(len(images))), kind)
    except ValueError as error:
        raise ConfigError(f"data.normalize: {error}") from error
    arrays = {"mean_image": statistics.mean_image, "whitening": statistics.whitening}
    mean, std = _three(statistics.mean), _three(statistics.std)
    log.info("measured on %d training images: mean %s, std %s", len(samples), mean, std)
    return (
        dataclasses.replace(preprocess, mean=mean, std=std, normalize=kind),
        {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None},
    )


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (round(float(value), 6) for value in values)
    return red, green, blue


def make_module(
    config: Config,
    manifest: "Manifest",
    augmenter: "Augmenter",
    preprocess: "Preprocess",
    arrays: Mapping[str, Any],
    source: "SourceModel | None" = None,
) -> "tuple[ClassifierModule, dict[str, Any] | None]":
    """Return (the training module with its initial weights, the bundle's record of the text network or None).

    source: the model that training starts from, whose folder is config.model.weights; None without one.
    Raises ConfigError for values that the network, the optimiser or the loss rejects.
    """
    import torch

    from refract.models.classifier import Classifier
    from refract.models.training.activation_checkpointing import recompute_activations
    from refract.models.training.lightning_module import ClassifierModule
    from refract.models.training.lora import add_adapters
    from refract.models.training.objective import balanced_weights

    model, count = config.model, len(manifest.labels)
    try:
        network, tokens, text = _network(config, manifest.labels, source)
        if model.mode == "lora":
            add_adapters(
                network,
                _blank_inputs(reads(config), 1, config.data.sides()),
                rank=model.lora_rank,
                alpha=model.lora_alpha,
            )
        classifier = Classifier(
            network,
            tokens=tokens,
            mean=preprocess.mean,
            std=preprocess.std,
            normalize=preprocess.normalize,
            image_size=config.data.sides(),
            **arrays,
        )
        start_weights(config, classifier, preprocess, manifest)
    except (ValueError, OSError, TypeError, RuntimeError, MemoryError, *FROM_ARGS) as error:
        line = _line(error) if source is None else _line(error).replace(str(source.bundle.path), source.weights)
        raise ConfigError(f"model: {line}") from error
    classifier.frozen_norms = bool(model.frozen_norms)
    teacher, teacher_size = _teacher(config, manifest, classifier)
    _check_runs(config, classifier, "model.name: " + model.name, manifest.labels)
    if teacher is not None:
        sized = {} if teacher_size is None else {"data.image_size": teacher_size, "trainer.start_size": 1.0}
        _check_runs(config.changed(sized), teacher, f"loss.teacher: {config.loss.teacher}", manifest.labels)
    if config.trainer.gradient_checkpointing:
        try:
            recompute_activations(classifier.network)
        except ValueError as error:
            raise ConfigError(f"trainer.gradient_checkpointing: {error}; set it to false") from error
    counts = list(manifest.counts("train").values())
    module = ClassifierModule(
        classifier,
        task=manifest.task,
        num_classes=count,
        optim=config.optim,
        loss=config.loss,
        mix=augmenter.mix if augmenter.mixes else None,
        # The memory format channels_last exists only for 4-dimensional tensors.
        channels_last=all(parameter.ndim < 5 for parameter in classifier.parameters()),
        class_weights=balanced_weights(counts) if config.loss.class_weights == "balanced" else None,
        class_counts=torch.tensor(counts, dtype=torch.float32),
        mode="feature-extract" if model.on_embeddings else model.mode,
        unfreeze_epochs=model.unfreeze_epochs or 0,
        teacher=teacher,
        teacher_size=teacher_size,
        start_size=config.trainer.start_size,
    )
    return module, text


def _network(
    config: Config, labels: Sequence[str], source: "SourceModel | None"
) -> "tuple[Any, Tokens | None, dict[str, Any] | None]":
    """Return (the network, its tokeniser or None, the bundle's record of the text network or None)."""
    from refract.models.factory import text_record
    from refract.models.head import head_of, neutralise_head
    from refract.models.multimodal.fusion import Reader
    from refract.models.multimodal.text_networks import make_text_encoder
    from refract.models.pretrained.weights import load_weights
    from refract.models.registry import build

    model, text, count = config.model, config.text, len(labels)
    reader_record = None if source is None else source.bundle.info.text
    weights = model.weights if reader_record is None else "none"
    image_options: dict[str, Any] = {"image_size": config.data.sides(), "weights": weights, "args": model.args}
    if text.name == "none":
        if reader_record is not None:
            raise ValueError(
                f"weights={model.weights!r}: the model reads texts; set text.name: {reader_record['name']}"
            )
        rows = head_rows(source, labels)
        return build(model.name, count, head=model.head_name, head_rows=rows, **image_options), None, None
    text_options: dict[str, Any] = {
        "weights": text.weights if reader_record is None else "none",
        "max_length": text.max_length,
        "pooling": text.pooling,
        "args": text.args,
    }
    part, tokens, text_network = make_text_encoder(text.name, **text_options)
    image_network = None if model.name == NO_IMAGES else build(model.name, count, **image_options)
    fusion: dict[str, Any] = {"fusion": text.fusion, "width": text.width}
    drops: dict[str, Any] = {"drop_image": text.drop_image, "drop_text": text.drop_text}
    reader = Reader(image_network, text_network, count, head=model.head, **fusion, **drops)
    record = text_record(part, fusion)
    if source is not None and reader_record is not None:
        if record != reader_record:
            differing = [key for key in record if record[key] != reader_record.get(key)]
            raise ValueError(
                f"weights={model.weights!r}: the model's text network differs from the config's section text: {', '.join(differing)}"
            )
        load_weights(reader, head_of(reader), model.weights, head_rows(source, labels))
    elif loads_weights(config):
        neutralise_head(reader)
    return reader, tokens, record


def _check_runs(config: Config, classifier: "Classifier", where: str, classes: Sequence[str]) -> None:
    """Raise ConfigError if the classifier fails on a batch of blank images, at the image size of any epoch. where: its config key."""
    import torch

    from refract.models.training.activation_checkpointing import frozen_batch_statistics
    from refract.models.training.lightning_module import size_at

    full, epochs, count = config.data.sides(), config.trainer.max_epochs, len(classes)
    sizes = dict.fromkeys(size_at(epoch, epochs, config.trainer.start_size, full) for epoch in range(epochs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), frozen_batch_statistics(classifier.train()):
        for size in {**sizes, full: None}:
            try:
                logits = classifier(*_blank_inputs(classifier.reads, min(2, config.data.batch_size), size))
                if not isinstance(logits, torch.Tensor) or logits.shape != (min(2, config.data.batch_size), count):
                    shape = tuple(getattr(logits, "shape", ()))
                    raise ValueError(f"its output has shape {shape}, expected one number for each of {count} labels")
            except (RuntimeError, AssertionError, ValueError, TypeError, *FROM_ARGS) as error:
                hint = ""
                if size != full:
                    hint = " in some epochs; set trainer.start_size: 1.0"
                elif "more than 1 value per channel" in str(error):
                    hint = ": its batch norms need a data.batch_size of at least 2"
                raise ConfigError(
                    f"{where} cannot train on {min(2, config.data.batch_size)} images of {size[0]}×{size[1]} pixels{hint} ({_line(error)})"
                ) from error


def _blank_inputs(modalities: frozenset[str], count: int, size: tuple[int, int]) -> "Inputs":
    import torch

    images = torch.zeros(count, 3, *size) if "images" in modalities else None
    if "texts" not in modalities:
        return (images,)
    return images, torch.ones(count, 4, dtype=torch.int32), torch.ones(count, dtype=torch.bool)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:400]


def _teacher(
    config: Config, manifest: "Manifest", student: "Classifier"
) -> "tuple[Classifier | None, tuple[int, int] | None]":
    """Load the teacher of `loss.teacher`, None if there is none, and its (height, width) if this is not the student's.

    Raises ConfigError if its labels, task, aspect ratio or tokens differ from the student's, or if it reads a modality that the student
    does not read.
    """
    if config.loss.teacher is None:
        return None, None
    from refract.models.bundle.bundle import BundleError, load_bundle

    try:
        bundle = load_bundle(config.loss.teacher)
        classifier = bundle.classifier()
    except BundleError as error:
        raise ConfigError(f"loss.teacher: {error}") from error
    where = f"loss.teacher: {config.loss.teacher}"
    if extra := classifier.reads - student.reads:
        raise ConfigError(f"{where} reads {' and '.join(sorted(extra))}, which this training does not read")
    facts: list[tuple[str, Any, Any]] = [
        ("task", bundle.info.task, manifest.task),
        ("labels", bundle.info.labels, manifest.labels),
    ]
    size, student_size = tuple(bundle.info.network["image_size"]), config.data.sides()
    ratio = size[0] * student_size[1] / (size[1] * student_size[0])
    if "images" in classifier.reads and not 1 / LARGEST_STRETCH <= ratio <= LARGEST_STRETCH:
        raise ConfigError(
            f"{where} has the image size {size}, but this training has {student_size}, of another aspect ratio"
        )
    for name, teacher_value, student_value in facts:
        if teacher_value != student_value:
            raise ConfigError(f"{where} has the {name} {teacher_value}, but this training has {student_value}")
    if classifier.tokens is not None and classifier.tokens != student.tokens:
        raise ConfigError(
            f"{where} tokenises texts differently from this training; use its text.name, text.max_length and text.args"
        )
    return classifier, size if "images" in classifier.reads and size != student_size else None


def _weights_preprocess(model: ModelConfig) -> Mapping[str, Any]:
    """Return the preprocessing that is recorded with the weights, empty if there is none."""
    from refract.models.registry import weights_preprocess

    try:
        return weights_preprocess(model.name, model.weights) or {}
    except ValueError as error:
        raise ConfigError(f"model.name: {error}") from error
