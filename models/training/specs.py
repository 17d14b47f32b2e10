"""The parameters of the optimiser, its schedule and the loss, which are also the config's sections `optim` and `loss`.

Importing this module imports no PyTorch. The class docstrings are the text of `refract train --help`; the accepted values of a field follow
from its declaration.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from refract.models.fields import Checked, number, one_of
from refract.models.training.losses import AUTO, loss_names
from refract.models.training.optimizers import OPTIMIZERS
from refract.models.training.schedules import SCHEDULES, warmup_schedule

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimSpec(Checked):
    """The optimiser and the learning rate schedule.

    Args:
        name: optimiser.
        lr: peak learning rate; null chooses it by the optimiser, model.mode and model.weights.
        head_lr: factor on the learning rate for the head; null uses 10 for the new head of loaded weights (30 with gradual and
            linear-then-fine-tune, 3 with lora), else 1.
        weight_decay: weight decay, decoupled for adamw, lion and muon; norms and biases are never decayed.
        momentum: momentum of sgd, rmsprop and muon.
        nesterov: use Nesterov momentum; applies to sgd.
        schedule: learning rate schedule by step.
        warmup: fraction of all steps in which the learning rate rises linearly to its peak.
        lr_end: lowest learning rate after the warm-up, as a fraction of the peak.
        norm_lr: factor on the learning rate for the parameters of normalisation layers.
        layer_decay: factor on the learning rate for each block further from the head.
        sam: radius of sharpness-aware minimisation, such as 0.05; 0 disables it. It takes two forward and backward passes per step.
        clip_norm: upper bound of the gradient's norm; null does not clip.
        clip_value: upper bound of each gradient element's absolute value; null does not clip.

    ValueError for a value that a field does not accept.
    """

    name: str = one_of("adamw", lambda: OPTIMIZERS)
    lr: float | None = number(None, gt=0)
    head_lr: float | None = number(None, gt=0)
    weight_decay: float = number(0.05, ge=0)
    momentum: float = number(0.9, ge=0, lt=1)
    nesterov: bool = True
    schedule: str = one_of("cosine", lambda: SCHEDULES)
    warmup: float = number(0.1, ge=0, le=1)
    lr_end: float = number(0.0, ge=0, le=1)
    norm_lr: float = number(1.0, gt=0)
    layer_decay: float = number(1.0, gt=0, le=1)
    sam: float = number(0.0, ge=0)
    clip_norm: float | None = number(None, gt=0, finite=False)
    clip_value: float | None = number(None, gt=0, finite=False)

    @property
    def peak_lr(self) -> float:
        """`lr`. ValueError while it is None: a training chooses a value before it builds the optimiser."""
        if self.lr is None:
            raise ValueError("lr=None: expected a number above 0 to build the optimiser")
        return self.lr

    @property
    def head_factor(self) -> float:
        """`head_lr`, 1 for None."""
        return 1.0 if self.head_lr is None else self.head_lr

    def make(self, network: "nn.Module") -> "torch.optim.Optimizer":
        """Build the optimiser for the parameters of `network` that are trainable now. ValueError if `lr` is None."""
        from refract.models.training.parameter_groups import parameter_groups
        from refract.models.training.sam import SAM

        groups = parameter_groups(network, self)
        build = OPTIMIZERS[self.name].make
        return SAM(groups, lambda groups: build(groups, self), rho=self.sam) if self.sam else build(groups, self)

    def factor(self, step: int, total_steps: int, head_steps: int = 0) -> float:
        """Compute the factor on `lr` at `step`, counted from 0, of `total_steps`: see `warmup_schedule`.

        head_steps: the number of first steps that train only the head. These steps and the later steps each have a separate warm-up and
        schedule (Howard & Gugger 2020, arXiv:2002.04688, section 2, fastai's `fine_tune`).
        """
        if step < head_steps:
            return warmup_schedule(self.schedule, step, head_steps, self.warmup, self.lr_end)
        rest = max(1, total_steps - head_steps)
        return warmup_schedule(self.schedule, step - head_steps, rest, self.warmup, self.lr_end)


@dataclass(frozen=True, kw_only=True)
class LossSpec(Checked):
    """The training loss.

    Args:
        name: loss, of Refract or of a plugin; auto is bce for multilabel, else cross_entropy.
        label_smoothing: amount of label smoothing.
        gamma: focusing parameter of the focal loss.
        class_weights: balanced weights each class by the inverse of its number of training images; none weights all classes equally.
        consistency: weight of the divergence between the predictions for three views of each image (12 in the AugMix paper); the policy
            must contain AugMix.
        penalty: weight of the elastic net on the weights.
        l1_ratio: part of L1 in the elastic net: 1 is L1, 0 is L2.
        teacher: bundle to distil from, with the same labels and aspect ratio, and the same tokens if it reads texts; it sees the images
            resized to its own size; null disables it.
        distill: weight of the distillation loss against the loss on the labels.
        temperature: softmax temperature of teacher and student in the distillation loss.

    ValueError for a value that a field does not accept.
    """

    name: str = one_of(AUTO, loss_names, extensible=True)
    label_smoothing: float = number(0.0, ge=0, lt=1)
    gamma: float = number(2.0, ge=0)
    class_weights: Literal["none", "balanced"] = "none"
    consistency: float = number(0.0, ge=0)
    penalty: float = number(0.0, ge=0)
    l1_ratio: float = number(0.0, ge=0, le=1)
    teacher: str | None = None
    distill: float = number(0.5, ge=0, le=1)
    temperature: float = number(4.0, gt=0)
