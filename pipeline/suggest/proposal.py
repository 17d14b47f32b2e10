"""Choose the values of a first config, each with its reason."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refract.pipeline.suggest.network import ProposedNetwork, choose_network, missing_weights_notes, named_network
from refract.pipeline.suggest.policy import choose_policy
from refract.pipeline.suggest.start import Start
from refract.pipeline.suggest.survey import TEST_FRACTION, VAL_FRACTION, Survey
from refract.remote.address import is_remote


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


def propose(survey: Survey, start: Start | None = None) -> Proposal:
    """Propose a config for the data: network, initial weights, augmentation, and a training of moderate length.

    start: network and weights that the user names; None chooses them. ConfigError if they do not fit the data.
    """
    network = choose_network(survey) if start is None else named_network(survey, start)
    gpu = survey.device == "cuda"
    batch, batch_reason = _batch_size(survey, network.size, gpu=gpu)
    epochs, epochs_reason = _epochs(survey, network, batch, gpu=gpu)
    choices = [
        *_data(survey, network),
        Choice("data.batch_size", batch, batch_reason),
        Choice("data.workers", None, "data loading processes; null chooses for this machine", from_data=False),
        Choice("data.on_bad_file", "error", "skip excludes unreadable files", from_data=False),
        *_augment(survey, network),
        *_model(survey, network),
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
    if any(choice.value == "probe" for choice in choices if choice.key == "model.mode"):
        choices = [_for_later(choice) for choice in choices]
    return Proposal(tuple(choices), (*survey.notes, *missing_weights_notes(survey, network)))


def _for_later(choice: Choice) -> Choice:
    """Say in the reason if `model.mode: probe` does not use the key. The values fit a later fine-tuning."""
    if choice.key in ("augment.policy", "optim.lr", "trainer.max_epochs"):
        return replace(choice, reason=f"not for probe; for fine-tune: {choice.reason}")
    if choice.key == "data.batch_size":
        return replace(choice, reason=choice.reason.partition(":")[0])
    return choice


def _data(survey: Survey, network: ProposedNetwork) -> list[Choice]:
    named = survey.source == "digits" or is_remote(survey.source)
    choices = [
        Choice("data.source", survey.source if named else str(Path(survey.source)), "", from_data=False),
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


def _augment(survey: Survey, network: ProposedNetwork) -> list[Choice]:
    chosen = choose_policy(survey, pretrained=network.pretrained)
    return [Choice("augment.policy", chosen.policy, chosen.reason)]


def _model(survey: Survey, network: ProposedNetwork) -> list[Choice]:
    choices = [Choice("model.name", network.name, network.reason)]
    if not survey.images:
        return choices
    choices.append(Choice("model.weights", network.weights, network.weights_reason))
    if network.args:
        choices.append(Choice("model.args", network.args, "of the bundle's network"))
    if network.head != "linear":
        choices.append(Choice("model.head", network.head, "of the bundle's network"))
    return [*choices, *_mode(survey, network)]


def _mode(survey: Survey, network: ProposedNetwork) -> list[Choice]:
    """Choose the trained layers.

    With 196 photos of two classes, EfficientNet-Lite0 at 224 pixels and four epochs, fine-tuning reached 0.935 on 153 validation images,
    and a logistic regression on its features 0.948.
    """
    if not network.pretrained:
        return [Choice("model.mode", "fine-tune", "trains all weights", from_data=False)]
    if not survey.few:
        return [Choice("model.mode", "fine-tune", "trains all weights; probe fits only the head, in seconds")]
    fits_probe = network.head == "linear" and not network.args and not survey.texts and not survey.content.grey
    if fits_probe:
        reason = f"{survey.per_class} training images per class: a head fitted on embeddings, in seconds; fine-tune with more images"
        return [Choice("model.mode", "probe", reason)]
    reason = f"{survey.per_class} training images per class: the new head first"
    return [Choice("model.mode", "linear-then-fine-tune", reason)]


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


def _optim(network: ProposedNetwork) -> list[Choice]:
    reason = "low for pretrained weights" if network.pretrained else "2e-3 or 5e-3 by network, for AdamW from scratch"
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
        return (
            batch,
            f"about {survey.training:,} training samples: {max(1, math.ceil(survey.training / batch))} steps per epoch",
        )
    return largest, "usual for a GPU" if gpu else "usual for a CPU"


SMALL_BATCH = 64
"""Input side in pixels below which larger batches are proposed."""


def _epochs(survey: Survey, network: ProposedNetwork, batch: int, *, gpu: bool) -> tuple[int, str]:
    """Return (epochs, reason): by optimiser steps for pretrained weights, else by the number of images seen, limited for a short wait."""
    steps = max(1, math.ceil(survey.training / batch))
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
