"""The choices of a first config, each with its reason, as data."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refract.pipeline.config.config import ConfigError
from refract.pipeline.suggest.policy import choose_policy
from refract.pipeline.suggest.start import Start
from refract.pipeline.suggest.survey import TEST_SHARE, VAL_SHARE, Survey

FEW = 50
"""Training images of a class below which the head is trained alone first."""

ENLARGED = 128
"""Pixels to which small images are enlarged for a pretrained network."""

FEW_SMALL = 5_000
"""Training images up to which small images are enlarged for a pretrained network."""


@dataclass(frozen=True)
class Choice:
    """key: of the config, as `model.name`; value: for YAML, None leaves the key to its default; reason: a phrase; from_data: whether the
    data or the machine decided it."""

    key: str
    value: Any
    reason: str
    from_data: bool = True

    @property
    def shown(self) -> str:
        """The value for a table: an inline policy by its ops' names."""
        if self.value is None:
            return "default"
        if isinstance(self.value, list):
            return ", ".join(op if isinstance(op, str) else next(iter(op)) for op in self.value)
        return str(self.value)


@dataclass(frozen=True)
class Proposal:
    """choices: in the order of the config's sections; notes: for the user."""

    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()

    def value(self, key: str) -> Any:
        """KeyError where the proposal has no such key."""
        return {choice.key: choice.value for choice in self.choices}[key]

    def from_data(self) -> list[Choice]:
        """Those that the data or the machine decided."""
        return [choice for choice in self.choices if choice.from_data]


@dataclass(frozen=True)
class _Network:
    """size: of its input, pixels; sized: why; args, head: as `model.args` and `model.head`."""

    name: str
    reason: str
    weights: str
    weights_reason: str
    size: int
    sized: str
    args: dict[str, Any] = field(default_factory=dict)
    head: str = "linear"

    @property
    def pretrained(self) -> bool:
        return self.weights != "none"


def propose(survey: Survey, start: Start | None = None) -> Proposal:
    """A config for the data: a network and its start, an augmentation, and a training of a length that one waits for.

    start: the network and weights that the user names; None chooses them. ConfigError where they cannot read the data.
    """
    network = _network(survey) if start is None else _named_network(survey, start)
    gpu = survey.device == "cuda"
    batch, batch_reason = _batch_size(survey, network.size, gpu=gpu)
    epochs, epochs_reason = _epochs(survey, network, batch, gpu=gpu)
    notes = list(survey.notes)
    if survey.images and not network.pretrained and not survey.hub and _gains_from_weights(survey):
        notes.append(
            "note: training starts from scratch, as the hub of pretrained weights does not answer; "
            f"{survey.training:,} training images learn better from pretrained weights: "
            f"refract init {survey.source} --model.name resnet18 --model.weights FILE (.safetensors or .pth)"
        )
    choices = [
        *_data(survey, network),
        Choice("data.batch_size", batch, batch_reason),
        Choice("data.workers", None, "processes that load samples; null chooses for this machine", from_data=False),
        Choice("data.on_bad_file", "error", "skip leaves unreadable files out", from_data=False),
        *_augment(survey, network),
        *_model(survey, network, epochs),
        *_text(survey),
        *_optim(network),
        Choice("loss.label_smoothing", 0.0, "0.1 where labels are partly wrong", from_data=False),
        Choice("trainer.max_epochs", epochs, epochs_reason),
        Choice("trainer.seed", 0, "of splits, weights, order and augmentation", from_data=False),
        Choice("trainer.precision", "auto", "bf16 or fp16 where the device computes faster in it", from_data=False),
        Choice("tracking.experiment", "refract", "of MLflow", from_data=False),
        Choice(
            "tracking.model_name", _model_name(survey.source),
            "the first version becomes champion, later ones challenger; null registers none",
            from_data=False,
        ),
    ]  # fmt: skip
    return Proposal(tuple(choices), tuple(notes))


def _gains_from_weights(survey: Survey) -> bool:
    """Whether pretrained weights of ImageNet are expected to help."""
    return not survey.content.glyphs and (not survey.small or survey.training <= FEW_SMALL)


def _named_network(survey: Survey, start: Start) -> _Network:
    if not survey.images:
        raise ConfigError(
            f"{survey.source}: there are no images, so --model.name {start.name} has nothing to read; leave it out"
        )
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
    """Pixels of the input of a network that starts from random weights."""
    if survey.small:
        return 32 if survey.side <= 40 else 48
    return 128 if survey.side >= 128 else max(64, survey.side // 32 * 32)


def _network(survey: Survey) -> _Network:
    if not survey.images:
        return _Network("none", "no images: the texts alone", "none", "", 0, "")
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
            "default", "pretrained weights are within reach", size, _sized(survey, size, trained_at=224),
        )  # fmt: skip
    size = _scratch_size(survey)
    return _Network(
        "resnet18", "the smallest residual network for images of this size",
        "none", "the hub of pretrained weights does not answer; a file trains better", size, _sized(survey, size),
    )  # fmt: skip


def _sized(survey: Survey, size: int, *, trained_at: int = 0) -> str:
    """Why the network's input has `size` pixels. trained_at: pixels of the images that its weights were trained on, 0 without weights."""
    median = f"median shorter side {survey.side} px"
    if size == trained_at:
        return f"{median}; the size that the weights were trained at"
    if trained_at and survey.side < size:
        return f"{median}; pretrained networks read small images better enlarged"
    if survey.side >= 2 * size:
        return f"{median}, reduced for speed: {(survey.side / size) ** 2:.0f} times fewer pixels"
    return median


def _data(survey: Survey, network: _Network) -> list[Choice]:
    choices = [
        Choice("data.source", survey.source if survey.source == "digits" else str(Path(survey.source)), "", from_data=False),
        Choice("data.task", survey.task, _task_reason(survey)),
    ]  # fmt: skip
    if survey.images:
        whole = survey.small or survey.content.grey
        resize = "squash" if whole else "crop"
        reason = "the whole image" + ("" if survey.small else ", as a finding may lie at its edge")
        choices += [
            Choice("data.image_size", network.size, network.sized),
            Choice("data.resize", resize, reason if whole else "photos: the centre, with the ratio of its sides"),
        ]
    choices += [
        Choice(
            "data.val_fraction",
            VAL_SHARE,
            "drawn from the training samples where there is no `val` split",
            from_data=False,
        ),
        Choice("data.test_fraction", TEST_SHARE, "drawn as test set where there is no `test` split", from_data=False),
    ]
    return choices


def _task_reason(survey: Survey) -> str:
    if survey.task == "multilabel":
        return "labels with `;`"
    return "two classes" if survey.task == "binary" else f"{len(survey.labels)} classes, one a sample"


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
                "model.mode", "linear-then-fine-tune", f"{survey.per_class} training images a class: the new head first"
            ),
            Choice("model.unfreeze_epochs", head, "epochs of the head alone"),
        ]
    reason = "trains all weights; feature-extract trains the head alone" if network.pretrained else "trains all weights"
    return [*choices, Choice("model.mode", "fine-tune", reason, from_data=network.pretrained)]


def _text(survey: Survey) -> list[Choice]:
    if not survey.texts:
        return []
    return [
        Choice(
            "text.name",
            "hashing",
            f"{survey.texts:,} of {survey.samples:,} have a text; a transformer's name reads better",
        ),
        Choice("text.max_length", 64, "words", from_data=False),
    ]


def _optim(network: _Network) -> list[Choice]:
    reason = "pretrained weights need a low one" if network.pretrained else "2e-3 for AdamW from scratch"
    rate = Choice("optim.lr", None, f"null chooses by optimiser, mode and weights: {reason}")
    return [
        Choice("optim.name", "adamw", "", from_data=False),
        rate,
        Choice("optim.weight_decay", 0.05, "", from_data=False),
        Choice("optim.schedule", "cosine", "", from_data=False),
        Choice("optim.warmup", 0.1, "fraction of the steps", from_data=False),
    ]


def _batch_size(survey: Survey, size: int, *, gpu: bool) -> tuple[int, str]:
    most = (256 if size < SMALL_BATCH else 64) if gpu else (128 if size < SMALL_BATCH else 32)
    few = survey.training // 8
    if few < most:
        batch = max(8, 1 << max(0, few.bit_length() - 1))
        return batch, f"about {survey.training:,} training samples: {max(1, survey.training // batch)} steps an epoch"
    return most, "usual for a GPU" if gpu else "usual for a CPU"


SMALL_BATCH = 64
"""Pixels of the network's input below which larger batches are proposed."""


def _epochs(survey: Survey, network: _Network, batch: int, *, gpu: bool) -> tuple[int, str]:
    """By optimiser steps for pretrained weights; else by the images that a network from scratch needs, within what a person waits for."""
    steps = max(1, round(survey.training / batch))
    if network.pretrained:
        epochs = max(5, min(40, round((1500 if gpu else 500) / steps)))
        return epochs, f"{epochs * steps:,} steps of {batch} images"
    seen = 800_000 if gpu else 300_000 if network.size < SMALL_BATCH else 60_000
    epochs = max(5, min(60, seen // max(1, survey.training)))
    return epochs, f"from scratch: {epochs * survey.training:,} samples seen"


def _model_name(source: str) -> str:
    """From the name of the folder or file; of its parent where the name says nothing of the data."""
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
"""Names of data sets that say nothing of what the data shows."""
