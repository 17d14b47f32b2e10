"""Losses on soft targets, so that mixed and smoothed labels need no second code path."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refract.models.classifier import check_task
from refract.models.layers import pick
from refract.models.training.optimizers import decayed_parameter_ids
from refract.plugins import add_entry


def check_targets(targets: Tensor, num_classes: int, task: str) -> None:
    """Raise ValueError unless targets are class indices (N,) in 0…num_classes-1, or soft targets (N, num_classes).

    Call it before the indices are moved to a GPU: on a GPU it waits for the device.
    """
    check_task(task)
    if targets.ndim == 2 and targets.shape[1] == num_classes:
        return
    if task == "multilabel":
        raise ValueError(
            f"targets of shape {tuple(targets.shape)}: expected (N, {num_classes}) for the task multilabel"
        )
    if targets.ndim != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} and {targets.dtype}: "
            f"expected integer class indices (N,) or soft targets (N, {num_classes})"
        )
    if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < num_classes):
        wrong = targets[(targets < 0) | (targets >= num_classes)][0]
        raise ValueError(f"targets contain the class index {int(wrong)}: expected 0…{num_classes - 1}")


def soft_targets(targets: Tensor, num_classes: int, task: str) -> Tensor:
    """Convert class indices (N,) to one-hot rows, float32 (N, num_classes). Soft targets (N, num_classes) keep their values.

    ValueError as `check_targets` on the CPU. On another device the check would wait for the device: there the row of an index out of range
    becomes NaN.
    """
    if targets.device.type == "cpu" or targets.ndim != 1 or task == "multilabel":
        check_targets(targets, num_classes, task)
    if targets.ndim == 2:
        return targets.to(torch.float32)
    classes = torch.arange(num_classes, device=targets.device)
    one_hot = (targets[:, None] == classes).to(torch.float32)
    if targets.device.type == "cpu":
        return one_hot
    valid = (targets >= 0) & (targets < num_classes)
    return one_hot.masked_fill(~valid[:, None], float("nan"))


def consistency_loss(logits: Tensor, *, task: str) -> Tensor:
    """Compute the mean Jensen-Shannon divergence of the predictions for three views of each image, in nats, a float32 scalar.

    logits: (3, N, C), the views first. JS = (KL(p₁‖m) + KL(p₂‖m) + KL(p₃‖m)) / 3 with m = (p₁ + p₂ + p₃) / 3; for multilabel each
    label is a distribution over yes and no, and the labels' divergences are averaged. Between 0 and ln 3.
    Source: Hendrycks et al. 2020, "AugMix", arXiv:1912.02781, section 3, which adds 12 times this to the loss of the first view.
    """
    check_task(task)
    logits = logits.to(torch.float32)
    if task == "multilabel":
        logits = torch.stack([logits, torch.zeros_like(logits)], dim=-1)
    logs = logits.log_softmax(dim=-1)
    middle = logs.logsumexp(dim=0) - math.log(len(logs))
    return (logs.exp() * (logs - middle)).sum(dim=-1).mean()


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """The parameters of the training loss. ValueError for an unknown name or a number out of range.

    - name: one of LOSSES, or auto: cross_entropy, for multilabel bce
    - label_smoothing: in [0, 1)
    - gamma: the exponent of the focal loss, at least 0
    - consistency: weight of `consistency_loss`, at least 0
    - penalty: weight, at least 0, of the elastic net on matrices and kernels, l1_ratio ‖w‖₁ + (1 − l1_ratio) ‖w‖² / 2 (Zou & Hastie 2005)
    - l1_ratio: in [0, 1]; 1 is L1, 0 is L2
    - distill: weight of the distillation loss against the loss of the targets, in [0, 1]
    - temperature: of teacher and student logits in the distillation loss, above 0
    """

    name: str = "auto"
    label_smoothing: float = 0.0
    gamma: float = 2.0
    consistency: float = 0.0
    penalty: float = 0.0
    l1_ratio: float = 0.0
    distill: float = 0.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if self.name != "auto":
            pick("loss", self.name, LOSSES)
        rules = [
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a number in 0…1, without 1"),
            ("gamma", 0 <= self.gamma < math.inf, "a number of at least 0"),
            ("consistency", 0 <= self.consistency < math.inf, "a number of at least 0"),
            ("penalty", 0 <= self.penalty < math.inf, "a number of at least 0"),
            ("l1_ratio", 0 <= self.l1_ratio <= 1, "a number in 0…1"),
            ("distill", 0 <= self.distill <= 1, "a number in 0…1"),
            ("temperature", 0 < self.temperature < math.inf, "a number above 0"),
        ]
        for key, holds, accepted in rules:
            if not holds:
                raise ValueError(f"{key}={getattr(self, key)!r}: expected {accepted}")


def classification_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    task: str,
    name: str = "auto",
    label_smoothing: float = 0.0,
    gamma: float = 2.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Compute the mean loss of a batch, a float32 scalar.

    logits: (N, C), any float dtype; targets: as in `soft_targets`; class_weights: (C,), at least 0; name: one of LOSSES, or auto.
    Label smoothing: q' = (1 - ε) q + ε / C; for multilabel ε / 2 replaces ε / C, as each label is a binary decision.
    Class weights: the mean is divided by the mean of Σ_c w_c q_c, so that one-hot targets give PyTorch's weighted mean; for multilabel each
    label's loss is multiplied by its weight.
    ValueError for a label_smoothing outside [0, 1), class weights of another length, a loss that the task does not support, or bad targets.
    Source: label smoothing, Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    num_classes = logits.shape[1]
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing!r}: expected a number in 0…1, without 1")
    if class_weights is not None and class_weights.shape != (num_classes,):
        raise ValueError(f"class_weights of shape {tuple(class_weights.shape)}: expected ({num_classes},)")
    logits, hard = logits.to(torch.float32), soft_targets(targets, num_classes, task)
    multilabel = task == "multilabel"
    name = ("bce" if multilabel else "cross_entropy") if name == "auto" else name
    if multilabel and name in ("cross_entropy", "perceptron"):
        raise ValueError(f"loss={name!r} needs a task with one label per image; for multilabel set bce, focal or mse")
    offset = label_smoothing / (2 if multilabel else num_classes)
    smooth = hard * (1 - label_smoothing) + offset if label_smoothing else hard
    losses = pick("loss", name, LOSSES)(logits, smooth, multilabel, gamma)  # (N, C), to be summed or averaged over C
    if class_weights is None:
        return losses.mean() if multilabel or name in ("mse", "bce") else losses.sum(dim=1).mean()
    if multilabel:
        return (losses * class_weights).mean()
    if name == "cross_entropy":
        return (losses * class_weights).sum() / (hard * class_weights).sum()
    samples = losses.mean(dim=1) if name in ("mse", "bce") else losses.sum(dim=1)
    weights = (hard * class_weights).sum(dim=1)
    return (samples * weights).sum() / weights.sum()


def distillation_loss(logits: Tensor, teacher: Tensor, *, task: str, temperature: float) -> Tensor:
    """Compute T² KL(teacher ‖ student) at temperature T, in nats, averaged over the batch, a float32 scalar.

    logits, teacher: the logits of student and teacher, (N, C). For multilabel each label is a distribution over yes and no, and the labels'
    divergences are averaged.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    check_task(task)
    logits, teacher = logits.to(torch.float32) / temperature, teacher.to(torch.float32) / temperature
    if task == "multilabel":
        logits, teacher = (torch.stack([z, torch.zeros_like(z)], dim=-1) for z in (logits, teacher))
    log_p, log_q = teacher.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


def elastic_net(module: nn.Module, l1_ratio: float) -> Tensor:
    """Compute l1_ratio ‖w‖₁ + (1 − l1_ratio) ‖w‖² / 2 over the trainable weights that decay, a float32 scalar.

    The weights are those of `refract.models.training.optimizers.decayed_parameter_ids`.
    """
    decayed = decayed_parameter_ids(module)
    weights = [
        parameter.float() for parameter in module.parameters() if parameter.requires_grad and id(parameter) in decayed
    ]
    total = sum(l1_ratio * w.abs().sum() + (1 - l1_ratio) / 2 * w.square().sum() for w in weights)
    return torch.as_tensor(total, dtype=torch.float32)


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """Compute class weights N / (C · n_c), (C,) float32, with C non-empty classes: a class of average size gets 1, an empty class 0."""
    numbers = torch.tensor(counts, dtype=torch.float32)
    present = int((numbers > 0).sum())
    return torch.where(numbers > 0, numbers.sum() / (max(1, present) * numbers.clamp(min=1)), torch.zeros(()))


def _cross_entropy(logits: Tensor, targets: Tensor, multilabel: bool, gamma: float) -> Tensor:
    """Return −q_c log softmax(z)_c."""
    return -targets * logits.log_softmax(dim=1)


def _bce(logits: Tensor, targets: Tensor, multilabel: bool, gamma: float) -> Tensor:
    """Return −q_c log σ(z_c) − (1 − q_c) log(1 − σ(z_c))."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def _focal(logits: Tensor, targets: Tensor, multilabel: bool, gamma: float) -> Tensor:
    """Return each class's term of the cross-entropy times (1 − p)^γ, with p the predicted probability of that term's outcome.

    Source: Lin et al. 2017, arXiv:1708.02002, equation 4.
    """
    if multilabel:
        yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
        return -targets * _complement(yes) ** gamma * yes - (1 - targets) * _complement(no) ** gamma * no
    logs = logits.log_softmax(dim=1)
    return -targets * _complement(logs) ** gamma * logs


def _complement(logs: Tensor) -> Tensor:
    """Return 1 − p, at least 1e-6, because a power below 1 has no finite gradient at 0."""
    return (1 - logs.exp()).clamp(min=1e-6)


def _mse(logits: Tensor, targets: Tensor, multilabel: bool, gamma: float) -> Tensor:
    """Return (p_c − q_c)², p by softmax or, for multilabel, sigmoid. (The Brier score; SSE is C · N times its mean.)"""
    predicted = logits.sigmoid() if multilabel else logits.softmax(dim=1)
    return (predicted - targets).square()


def _perceptron(logits: Tensor, targets: Tensor, multilabel: bool, gamma: float) -> Tensor:
    """Return the terms of max_c z_c − Σ_c q_c z_c for each class. Its gradient is the perceptron's learning rule.

    Source: Rosenblatt 1958; Crammer & Singer 2001.
    """
    best = F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype)
    return (best - targets) * logits


_losses: dict[str, Callable[[Tensor, Tensor, bool, float], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "bce": _bce,
    "focal": _focal,
    "mse": _mse,
    "perceptron": _perceptron,
}

LOSSES: Mapping[str, Callable[[Tensor, Tensor, bool, float], Tensor]] = MappingProxyType(_losses)
"""(logits (N, C), soft targets (N, C), multilabel, gamma) → (N, C): each class's term of a sample's loss."""


def register_loss(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Add the loss of a plugin: (logits (N, C), soft targets (N, C)) → (N, C). PluginError if another loss has the name."""

    def terms(logits: Tensor, targets: Tensor, multilabel: bool, gamma: float) -> Tensor:
        losses = function(logits, targets)
        if losses.shape != logits.shape:
            raise ValueError(
                f"loss {name!r} returned the shape {tuple(losses.shape)}: expected {tuple(logits.shape)}, each class's term of a sample"
            )
        return losses

    add_entry("loss", _losses, name, terms)
