"""Build what a training needs: the preprocessing, the classifier and its training module."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from refract.pipeline.config.config import Config, ConfigError
from refract.pipeline.config.sections import ModelConfig, TextConfig
from refract.pipeline.training.initial_weights import head_rows, start_weights

if TYPE_CHECKING:
    from refract.augment import Augmenter, Preprocess
    from refract.models.classifier import Classifier, Inputs
    from refract.models.multimodal.tokens import Tokens
    from refract.models.training.lightning_module import ClassifierModule
    from refract.pipeline.data.manifest import Manifest
    from refract.pipeline.training.source_model import SourceModel

log = logging.getLogger(__name__)

FROM_ARGS = (LookupError, ArithmeticError, AttributeError)
"""Further exceptions of third-party networks for a wrong value in `model.args`."""

LARGEST_STRETCH = 1.05
"""Largest ratio of the aspect ratios of teacher and student. The sides of a smaller size are rounded."""


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
    from refract.models.training.lightning_module import ClassifierModule, size_at
    from refract.models.training.lora import add_adapters
    from refract.models.training.objective import balanced_weights

    model, count, size = config.model, len(manifest.labels), config.data.sides()
    try:
        network, tokens, text = _network(model, config.text, size, manifest.labels, source)
        if model.mode == "lora":
            add_adapters(
                network,
                _blank_inputs(config.reads, 1, size),
                rank=model.lora_rank,
                alpha=model.lora_alpha,
            )
        classifier = Classifier(
            network,
            tokens=tokens,
            mean=preprocess.mean,
            std=preprocess.std,
            normalize=preprocess.normalize,
            image_size=size,
            **arrays,
        )
        start_weights(model, classifier, preprocess, manifest)
    except (ValueError, OSError, TypeError, RuntimeError, MemoryError, *FROM_ARGS) as error:
        line = _line(error) if source is None else _line(error).replace(str(source.bundle.path), source.weights)
        raise ConfigError(f"model: {line}") from error
    classifier.frozen_norms = bool(model.frozen_norms)
    teacher, teacher_size = _teacher(config.loss.teacher, size, manifest, classifier)
    epochs, images = config.trainer.max_epochs, min(2, config.data.batch_size)
    sizes = [size_at(epoch, epochs, config.trainer.start_size, size) for epoch in range(epochs)]
    _check_runs(classifier, f"model.name: {model.name}", count, images, [*sizes, size])
    if teacher is not None:
        teacher_sizes = [*sizes, size] if teacher_size is None else [teacher_size]
        _check_runs(teacher, f"loss.teacher: {config.loss.teacher}", count, images, teacher_sizes)
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
    model: ModelConfig, text: TextConfig, size: tuple[int, int], labels: Sequence[str], source: "SourceModel | None"
) -> "tuple[Any, Tokens | None, dict[str, Any] | None]":
    """Return (the network, its tokeniser or None, the bundle's record of the text network or None)."""
    from refract.models.factory import text_record
    from refract.models.head import head_of, neutralise_head
    from refract.models.multimodal.fusion import Reader
    from refract.models.multimodal.text_networks import make_text_encoder
    from refract.models.pretrained.weights import load_weights
    from refract.models.registry import build

    count = len(labels)
    reader_record = None if source is None else source.bundle.info.text
    weights = model.weights if reader_record is None else "none"
    image_options: dict[str, Any] = {"image_size": size, "weights": weights, "args": model.args}
    if not text.reads_texts:
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
    image_network = build(model.name, count, **image_options) if model.reads_images else None
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
    elif model.weights != "none" or text.loads_weights:
        neutralise_head(reader)
    return reader, tokens, record


def _check_runs(
    classifier: "Classifier", where: str, count: int, images: int, sizes: Sequence[tuple[int, int]]
) -> None:
    """Raise ConfigError if the classifier fails on a batch of blank images.

    where: its config key; count: number of labels; images: of the batch; sizes: (height, width) in each epoch, the network's last.
    """
    import torch

    from refract.models.training.activation_checkpointing import frozen_batch_statistics

    with torch.no_grad(), torch.random.fork_rng(devices=[]), frozen_batch_statistics(classifier.train()):
        for size in dict.fromkeys(sizes):
            try:
                logits = classifier(*_blank_inputs(classifier.reads, images, size))
                if not isinstance(logits, torch.Tensor) or logits.shape != (images, count):
                    shape = tuple(getattr(logits, "shape", ()))
                    raise ValueError(f"its output has shape {shape}, expected one number for each of {count} labels")
            except (RuntimeError, AssertionError, ValueError, TypeError, *FROM_ARGS) as error:
                hint = ""
                if size != sizes[-1]:
                    hint = " in some epochs; set trainer.start_size: 1.0"
                elif "more than 1 value per channel" in str(error):
                    hint = ": its batch norms need a data.batch_size of at least 2"
                raise ConfigError(
                    f"{where} cannot train on {images} images of {size[0]}×{size[1]} pixels{hint} ({_line(error)})"
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
    folder: str | None, student_size: tuple[int, int], manifest: "Manifest", student: "Classifier"
) -> "tuple[Classifier | None, tuple[int, int] | None]":
    """Load the teacher of `loss.teacher`, None if there is none, and its (height, width) if this is not the student's.

    Raises ConfigError if its labels, task, aspect ratio or tokens differ from the student's, or if it reads a modality that the student
    does not read.
    """
    if folder is None:
        return None, None
    from refract.models.bundle.bundle import BundleError, load_bundle

    try:
        bundle = load_bundle(folder)
        classifier = bundle.classifier()
    except BundleError as error:
        raise ConfigError(f"loss.teacher: {error}") from error
    where = f"loss.teacher: {folder}"
    if extra := classifier.reads - student.reads:
        raise ConfigError(f"{where} reads {' and '.join(sorted(extra))}, which this training does not read")
    facts: list[tuple[str, Any, Any]] = [
        ("task", bundle.info.task, manifest.task),
        ("labels", bundle.info.labels, manifest.labels),
    ]
    size = tuple(bundle.info.network["image_size"])
    ratio = size[0] * student_size[1] / (size[1] * student_size[0])
    if "images" in classifier.reads and not 1 / LARGEST_STRETCH <= ratio <= LARGEST_STRETCH:
        raise ConfigError(
            f"{where} has the image size {size}, but this training has {student_size}, of another aspect ratio"
        )
    for name, teacher_value, student_value in facts:
        if teacher_value != student_value:
            raise ConfigError(
                f"{where} has the {name} {teacher_value}, but this training has {student_value}; "
                "name a bundle of the same data, or set loss.teacher: null"
            )
    if classifier.tokens is not None and classifier.tokens != student.tokens:
        raise ConfigError(
            f"{where} tokenises texts differently from this training; use its text.name, text.max_length and text.args"
        )
    return classifier, size if "images" in classifier.reads and size != student_size else None
