"""Choose the values of a first config, each with its reason."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refract.pipeline.config.config import ConfigError
from refract.pipeline.suggest.policy import choose_policy
from refract.pipeline.suggest.start import Start
from refract.pipeline.suggest.survey import TEST_FRACTION, VAL_FRACTION, Survey

FEW = 50
"""Training images per class below which the head is trained alone first."""

ENLARGED = 128
"""Side in pixels to which small images are enlarged for a pretrained network."""

FEW_SMALL = 5_000
"""Training images up to which small images are enlarged for a pretrained network."""


@dataclass(frozen=True)
class Choice:
    """One key of the config.

    key: such as `model.name`; value: YAML value, None for the key's default; reason: a phrase; from_data: whether the value depends on the
    data or the machine.
    """

    key: str
    value: Any
    reason: str
    from_data: bool = True

    @property
    def shown(self) -> str:
        """The value for a table; an inline policy is shown by the names of its ops."""
        if self.value is None:
            return "default"
        if isinstance(self.value, list):
            return ", ".join(op if isinstance(op, str) else next(iter(op)) for op in self.value)
        return str(self.value)


@dataclass(frozen=True)
class Proposal:
    """A proposed config. choices: in the order of the config's sections; notes: notes for the user."""

    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()

    def value(self, key: str) -> Any:
        """Return the value of a key. KeyError for a key that the proposal lacks."""
        return {choice.key: choice.value for choice in self.choices}[key]

    def from_data(self) -> list[Choice]:
        """Return the choices that depend on the data or the machine."""
        return [choice for choice in self.choices if choice.from_data]


@dataclass(frozen=True)
class _Network:
    """The proposed network.

    size: side of the input in pixels; size_reason: reason for the size; args, head: values of `model.args` and `model.head`.
    """

    name: str
    reason: str
    weights: str
    weights_reason: str
    size: int
    size_reason: str
    args: dict[str, Any] = field(default_factory=dict)
    head: str = "linear"

    @property
    def pretrained(self) -> bool:
        return self.weights != "none"


def propose(survey: Survey, start: Start | None = None) -> Proposal:
    """Propose a config for the data: network, initial weights, augmentation, and a training of moderate length.

    start: network and weights that the user names; None chooses them. ConfigError if they do not fit the data.
    """
    network = _network(survey) if start is None else _named_network(survey, start)
    gpu = survey.device == "cuda"
    batch, batch_reason = _batch_size(survey, network.size, gpu=gpu)
    epochs, epochs_reason = _epochs(survey, network, batch, gpu=gpu)
    notes = list(survey.notes)
    if survey.images and not network.pretrained and not survey.hub and _gains_from_weights(survey):
        notes.append(
            "note: training starts from scratch, as the server of pretrained weights is unreachable; "
            f"for {survey.training:,} training images pretrained weights are better: "
            f"refract init {survey.source} --model.name resnet18 --model.weights FILE (.safetensors or .pth)"
        )
    choices = [
        *_data(survey, network),
        Choice("data.batch_size", batch, batch_reason),
        Choice("data.workers", None, "data loading processes; null chooses for this machine", from_data=False),
        Choice("data.on_bad_file", "error", "skip excludes unreadable files", from_data=False),
        *_augment(survey, network),
        *_model(survey, network, epochs),
        *_text(survey),
        *_optim(network),
        Choice("loss.label_smoothing", 0.0, "0.1 if some labels are wrong", from_data=False),
        Choice("trainer.max_epochs", epochs, epochs_reason),
        Choice("trainer.seed", 0, "random seed of splits, weights, order and augmentation", from_data=False),
        Choice("trainer.precision", "auto", "bf16 or fp16 if the device computes faster in it", from_data=False),
        Choice("tracking.experiment", "refract", "MLflow experiment", from_data=False),
        Choice(
            "tracking.model_name", _model_name(survey.source),
            "the first version becomes champion, later ones challenger; null registers none",
            from_data=False,
        ),
    ]  # fmt: skip
    return Proposal(tuple(choices), tuple(notes))


def _gains_from_weights(survey: Survey) -> bool:
    """Return whether ImageNet weights are expected to help."""
    return not survey.content.glyphs and (not survey.small or survey.training <= FEW_SMALL)


def _named_network(survey: Survey, start: Start) -> _Network:
    if not survey.images:
        raise ConfigError(f"--model.name: {start.name} reads images, and {survey.source} has none; remove the option")
    pretrained = start.weights != "none"
    size = start.size if pretrained and start.size else _scratch_size(survey)
    if pretrained and not start.fixed and survey.side < size // 2:
        size = max(min(size, ENLARGED), survey.side // 32 * 32)
    return _Network(
        start.name, "named by --model.name" if not start.args else "the network of the weights", start.weights,
        "named by --model.weights" if pretrained else "no weights are named",
        size, _sized(survey, size, trained_at=start.size if pretrained else 0), start.args, start.head,
    )  # fmt: skip


def _scratch_size(survey: Survey) -> int:
    """Return the input side in pixels of a network with random weights."""
    if survey.small:
        return 32 if survey.side <= 40 else 48
    return 128 if survey.side >= 128 else max(64, survey.side // 32 * 32)


def _network(survey: Survey) -> _Network:
    if not survey.images:
        return _Network("none", "no images: only texts", "none", "", 0, "")
    if survey.small and not (survey.hub and survey.training <= FEW_SMALL):
        size = _scratch_size(survey)
        return _Network(
            "resnet20", f"a residual network for images of about {size} px",
            "none", "a network this small is trained from scratch", size, _sized(survey, size),
        )  # fmt: skip
    if survey.hub:
        size = 224 if survey.side >= 112 else ENLARGED
        return _Network(
            "resnet18", "pretrained on ImageNet and fast; resnet50 is better and slower",
            "default", "pretrained weights are available", size, _sized(survey, size, trained_at=224),
        )  # fmt: skip
    size = _scratch_size(survey)
    return _Network(
        "resnet18", "the smallest residual network for images of this size",
        "none", "the server of pretrained weights is unreachable; a weights file is better", size, _sized(survey, size),
    )  # fmt: skip


def _sized(survey: Survey, size: int, *, trained_at: int = 0) -> str:
    """Return the reason for the input side `size`. trained_at: side of the images that the weights were trained on, 0 without weights."""
    median = f"median shorter side {survey.side} px"
    if size == trained_at:
        return f"{median}; the size that the weights were trained at"
    if trained_at and survey.side < size:
        return f"{median}; small images are enlarged for the pretrained network"
    if survey.side >= 2 * size:
        return f"{median}, reduced for speed: {(survey.side / size) ** 2:.0f} times fewer pixels"
    return median


def _data(survey: Survey, network: _Network) -> list[Choice]:
    choices = [
        Choice("data.source", survey.source if survey.source == "digits" else str(Path(survey.source)), "", from_data=False),
        Choice("data.task", survey.task, _task_reason(survey)),
    ]  # fmt: skip
    if survey.images:
        squash = survey.small or survey.content.grey
        resize = "squash" if squash else "crop"
        reason = "the whole image" + ("" if survey.small else ", as a finding may be at its edge")
        choices += [
            Choice("data.image_size", network.size, network.size_reason),
            Choice("data.resize", resize, reason if squash else "photos: the centre, with the aspect ratio kept"),
        ]
    choices += [
        Choice(
            "data.val_fraction",
            VAL_FRACTION,
            "drawn from the training samples if there is no `val` split",
            from_data=False,
        ),
        Choice(
            "data.test_fraction", TEST_FRACTION, "drawn as the test set if there is no `test` split", from_data=False
        ),
    ]
    return choices


def _task_reason(survey: Survey) -> str:
    if survey.task == "multilabel":
        return "labels with `;`"
    return "two classes" if survey.task == "binary" else f"{len(survey.labels)} classes, one per sample"


def _augment(survey: Survey, network: _Network) -> list[Choice]:
    chosen = choose_policy(survey, pretrained=network.pretrained)
    return [Choice("augment.policy", chosen.policy, chosen.reason)]


def _model(survey: Survey, network: _Network, epochs: int) -> list[Choice]:
    choices = [Choice("model.name", network.name, network.reason)]
    if not survey.images:
        return choices
    choices.append(Choice("model.weights", network.weights, network.weights_reason))
    if network.args:
        choices.append(Choice("model.args", network.args, "of the bundle's network"))
    if network.head != "linear":
        choices.append(Choice("model.head", network.head, "of the bundle's network"))
    if network.pretrained and survey.per_class < FEW:
        head = max(1, epochs // 5)
        return [
            *choices,
            Choice(
                "model.mode",
                "linear-then-fine-tune",
                f"{survey.per_class} training images per class: the new head first",
            ),
            Choice("model.unfreeze_epochs", head, "epochs in which only the head is trained"),
        ]
    reason = "trains all weights; feature-extract trains only the head" if network.pretrained else "trains all weights"
    return [*choices, Choice("model.mode", "fine-tune", reason, from_data=network.pretrained)]


def _text(survey: Survey) -> list[Choice]:
    if not survey.texts:
        return []
    return [
        Choice(
            "text.name",
            "hashing",
            f"{survey.texts:,} of {survey.samples:,} samples have a text; a transformer is more accurate",
        ),
        Choice("text.max_length", 64, "words", from_data=False),
    ]


def _optim(network: _Network) -> list[Choice]:
    reason = "low for pretrained weights" if network.pretrained else "2e-3 for AdamW from scratch"
    learning_rate = Choice("optim.lr", None, f"null chooses it by optimiser, mode and weights: {reason}")
    return [
        Choice("optim.name", "adamw", "", from_data=False),
        learning_rate,
        Choice("optim.weight_decay", 0.05, "", from_data=False),
        Choice("optim.schedule", "cosine", "", from_data=False),
        Choice("optim.warmup", 0.1, "fraction of the steps", from_data=False),
    ]


def _batch_size(survey: Survey, size: int, *, gpu: bool) -> tuple[int, str]:
    largest = (256 if size < SMALL_BATCH else 64) if gpu else (128 if size < SMALL_BATCH else 32)
    few = survey.training // 8
    if few < largest:
        batch = max(8, 1 << max(0, few.bit_length() - 1))
        return batch, f"about {survey.training:,} training samples: {max(1, survey.training // batch)} steps per epoch"
    return largest, "usual for a GPU" if gpu else "usual for a CPU"


SMALL_BATCH = 64
"""Input side in pixels below which larger batches are proposed."""


def _epochs(survey: Survey, network: _Network, batch: int, *, gpu: bool) -> tuple[int, str]:
    """Return (epochs, reason): by optimiser steps for pretrained weights, else by the number of images seen, limited for a short wait."""
    steps = max(1, round(survey.training / batch))
    if network.pretrained:
        epochs = max(5, min(40, round((1500 if gpu else 500) / steps)))
        return epochs, f"{epochs * steps:,} steps of {batch} images"
    seen = 800_000 if gpu else 300_000 if network.size < SMALL_BATCH else 60_000
    epochs = max(5, min(60, seen // max(1, survey.training)))
    return epochs, f"from scratch: {epochs * survey.training:,} samples seen"


def _model_name(source: str) -> str:
    """Return a model name from the folder or file name; from its parent if the name is in GENERIC."""
    path = Path(source)
    stem = path.stem
    if stem.lower() in GENERIC:
        stem = path.absolute().parent.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-") or "model"


GENERIC = frozenset(
    [
        "all",
        "annotations",
        "data",
        "dataset",
        "images",
        "index",
        "labels",
        "manifest",
        "metadata",
        "samples",
        "train",
        "training",
    ]
)
"""Names of data sets that do not describe the data."""
