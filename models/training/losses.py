"""The loss of each task, on soft targets, so that mixed and smoothed labels need no second path."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refract.models.classifier import check_task
from refract.models.layers import pick
from refract.models.training.optimizers import decaying_of


def check_targets(targets: Tensor, num_classes: int, task: str) -> None:
    """ValueError unless targets are class indices (N,) in 0…num_classes-1, or soft (N, num_classes).

    Waits for the device where indices lie on one: call it before they are moved there.
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
            f"expected whole class indices (N,) or soft targets (N, {num_classes})"
        )
    if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < num_classes):
        wrong = targets[(targets < 0) | (targets >= num_classes)][0]
        raise ValueError(f"targets hold the class index {int(wrong)}: expected 0…{num_classes - 1}")


def soft_targets(targets: Tensor, num_classes: int, task: str) -> Tensor:
    """Class indices (N,) of whole numbers, or soft targets (N, num_classes) → float32 (N, num_classes).

    Indices become one-hot rows; what is soft stays. ValueError as `check_targets` on the CPU. On another device the
    check would stop the step until the device is done: there a row with an index out of range becomes NaN.
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
    """The mean Jensen-Shannon divergence of the answers to three views of each image, in nats, a float32 scalar.

    logits: (3, N, C), the views first. JS = (KL(p₁‖m) + KL(p₂‖m) + KL(p₃‖m)) / 3 with m = (p₁ + p₂ + p₃) / 3; for multilabel each
    label is a distribution over yes and no, and the labels' divergences are averaged. Between 0 and ln 3.
    Source: Hendrycks et al. 2020, "AugMix", arXiv:1912.02781, section 3, which trains with 12 times this beside the loss of the first view.
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
    """What training minimises. ValueError for an unknown name or a number out of range.

    name: of LOSSES, or auto: cross_entropy, for multilabel bce. label_smoothing: in [0, 1). gamma: of focal, at least 0. consistency:
    weight of `consistency_loss`. penalty: weight of the elastic net on matrices and kernels, l1_ratio ‖w‖₁ + (1 − l1_ratio) ‖w‖² / 2
    (Zou & Hastie 2005); l1_ratio in [0, 1]: 1 is L1, 0 is L2. distill: weight of the teacher's answers against the targets, in [0, 1];
    temperature: of both answers then, above 0.
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
    """The mean loss of a batch, a float32 scalar.

    logits: (N, C), any float dtype; targets: as `soft_targets` takes them; class_weights: (C,), at least 0; name: of LOSSES or auto.
    With label smoothing q' = (1 - ε) q + ε / C, for multilabel ε / 2, as each label is a decision between two.
    With weights the mean is divided by the mean of Σ_c w_c q_c, so that one-hot targets give PyTorch's weighted mean; for multilabel each
    label's loss is multiplied by its weight.
    ValueError for a label_smoothing outside 0…1 (1 excluded), class weights of another length, a loss that the task does not have, or
    bad targets. Source: label smoothing, Szegedy et al. 2016, arXiv:1512.00567, section 7.
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
        raise ValueError(f"loss={name!r} is for one label an image; for multilabel take bce, focal or mse")
    share = label_smoothing / (2 if multilabel else num_classes)
    smooth = hard * (1 - label_smoothing) + share if label_smoothing else hard
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
    """T² KL(teacher ‖ student) of the answers at temperature T, in nats, averaged over the batch, a float32 scalar; logits: both (N, C).

    For multilabel each label is a distribution over yes and no, and the labels are averaged.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    check_task(task)
    logits, teacher = logits.to(torch.float32) / temperature, teacher.to(torch.float32) / temperature
    if task == "multilabel":
        logits, teacher = (torch.stack([z, torch.zeros_like(z)], dim=-1) for z in (logits, teacher))
    wanted, given = teacher.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    return temperature**2 * (wanted.exp() * (wanted - given)).sum(dim=-1).mean()


def elastic_net(module: nn.Module, l1_ratio: float) -> Tensor:
    """l1_ratio ‖w‖₁ + (1 − l1_ratio) ‖w‖² / 2 over the trainable weights of layers, as of
    `refract.models.training.optimizers.decaying_of`, a float32 scalar."""
    decaying = decaying_of(module)
    found = [
        parameter.float() for parameter in module.parameters() if parameter.requires_grad and id(parameter) in decaying
    ]
    total = sum(l1_ratio * w.abs().sum() + (1 - l1_ratio) / 2 * w.square().sum() for w in found)
    return torch.as_tensor(total, dtype=torch.float32)


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """N / (C · n_c) for each class, (C,) float32: a class of average size has 1, an empty one 0."""
    numbers = torch.tensor(counts, dtype=torch.float32)
    present = int((numbers > 0).sum())
    return torch.where(numbers > 0, numbers.sum() / (max(1, present) * numbers.clamp(min=1)), torch.zeros(()))


def _cross_entropy(logits: Tensor, targets: Tensor, multilabel: bool, gamma: float) -> Tensor:
    """−q_c log softmax(z)_c."""
    return -targets * logits.log_softmax(dim=1)


def _bce(logits: Tensor, targets: Tensor, multilabel: bool, gamma: float) -> Tensor:
    """−q_c log σ(z_c) − (1 − q_c) log(1 − σ(z_c))."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def _focal(logits: Tensor, targets: Tensor, multilabel: bool, gamma: float) -> Tensor:
    """Each class's part of the entropy times (1 − p)^γ, p the probability given to what it says.

    Source: Lin et al. 2017, arXiv:1708.02002, equation 4.
    """
    if multilabel:
        yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
        return -targets * _doubt(yes) ** gamma * yes - (1 - targets) * _doubt(no) ** gamma * no
    logs = logits.log_softmax(dim=1)
    return -targets * _doubt(logs) ** gamma * logs


def _doubt(logs: Tensor) -> Tensor:
    """1 − p, not quite 0: a power below 1 has no gradient there."""
    return (1 - logs.exp()).clamp(min=1e-6)


def _mse(logits: Tensor, targets: Tensor, multilabel: bool, gamma: float) -> Tensor:
    """(p_c − q_c)², p by softmax or, for multilabel, sigmoid. (The Brier score; SSE is C · N times its mean.)"""
    given = logits.sigmoid() if multilabel else logits.softmax(dim=1)
    return (given - targets).square()


def _perceptron(logits: Tensor, targets: Tensor, multilabel: bool, gamma: float) -> Tensor:
    """max_c z_c − Σ_c q_c z_c, spread over the classes: its gradient is the perceptron's rule. Rosenblatt 1958; Crammer & Singer 2001."""
    best = F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype)
    return (best - targets) * logits


LOSSES: Mapping[str, Callable[[Tensor, Tensor, bool, float], Tensor]] = MappingProxyType(
    {"cross_entropy": _cross_entropy, "bce": _bce, "focal": _focal, "mse": _mse, "perceptron": _perceptron}
)
"""(logits (N, C), soft targets (N, C), multilabel, gamma) → (N, C): each class's part of a sample's loss."""
