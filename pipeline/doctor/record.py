"""What a training showed, as plain numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from refract.pipeline.evaluation.label_errors import NoiseEvidence

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, std) of R, G, B in 0…1."""


@dataclass
class Record:
    """What a training showed, and what the config says that decides the cures.

    classes: how many, 0 for multilabel and other losses than cross-entropy; lr: the peak; optimizer, network, args, weights, mode: the
    config's; losses: of each step, as optimised; soft: whether targets are smoothed or mixed; history: metrics of each epoch; gradients:
    layer → norm over the norm of its weights, from the input to the head, of one step each epoch; dead, saturated: layer → fraction of
    units, of the last look; unreached: trainable parameters without a gradient; seconds: of the parts of a step, summed: waiting, forward,
    backward, optimiser; workers: of the loader; inputs: mean and deviation of normalised images, `train` and `val`; normalisation: of the
    run, and weights_normalisation: that the weights were trained with, where both are known; said: class → fraction of the predictions on
    the test set, truth: of its labels; answered: samples of the test set; wrong: fraction of them that is predicted wrong; noise: see
    `refract.pipeline.evaluation.label_errors`; ops: names of the policy's.
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
