"""The measurements of a training that the doctor judges, as plain numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from refract.pipeline.evaluation.label_errors import NoiseEvidence

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, std) of R, G and B, in 0…1."""


@dataclass
class Record:
    """The measurements of a training, and the config values that decide the cures.

    From the config:
        classes: number of classes, 0 for multi-label data and for losses other than cross-entropy.
        lr: peak learning rate. optimizer, network, args, weights, mode: as configured.
        soft: whether targets are smoothed or mixed. workers: worker processes of the loader. ops: names of the policy's ops.
        normalisation: that of the run; weights_normalisation: that the weights were trained with; both None if either is unknown.
    Measured in training:
        losses: optimised loss of each step. history: metrics of each epoch.
        gradients: for one step of each epoch, layer → gradient norm over weight norm, from the input to the head.
        dead, saturated: layer → fraction of its units in the last inspected batch. unreached: trainable parameters without a gradient.
        seconds: total time of each phase of a step: waiting, forward, backward, optimiser.
        inputs: `train` and `val` → mean and standard deviation of normalised images.
    Measured on the test set:
        said: class → fraction of the predictions. truth: class → fraction of the labels. answered: number of samples.
        wrong: fraction of wrong predictions. noise: see `refract.pipeline.evaluation.label_errors`.
    """

    classes: int
    lr: float
    optimizer: str = "adamw"
    network: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    weights: str = "none"
    mode: str = "fine-tune"
    losses: list[float] = field(default_factory=list)
    soft: bool = False
    history: list[Mapping[str, float]] = field(default_factory=list)
    gradients: list[dict[str, float]] = field(default_factory=list)
    dead: dict[str, float] = field(default_factory=dict)
    saturated: dict[str, float] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    workers: int = 0
    inputs: dict[str, tuple[float, float]] = field(default_factory=dict)
    normalisation: Normalisation | None = None
    weights_normalisation: Normalisation | None = None
    said: dict[str, float] = field(default_factory=dict)
    truth: dict[str, float] = field(default_factory=dict)
    answered: int = 0
    wrong: float = 0.0
    noise: NoiseEvidence | None = None
    ops: tuple[str, ...] = ()

    @property
    def pretrained(self) -> bool:
        """Whether training starts from weights."""
        return self.weights != "none"
