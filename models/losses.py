"""The loss of each task, on soft targets, so that mixed and smoothed labels need no second path."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.classifier import check_task


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
    """The mean Jensen-Shannon divergence of the answers to three views of each picture, in nats, a float32 scalar.

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


def classification_loss(
    logits: Tensor, targets: Tensor, *, task: str, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """The mean loss of a batch, a float32 scalar.

    logits: (N, C), any float dtype; targets: as `soft_targets` takes them; class_weights: (C,), at least 0.
    binary, multiclass: -Σ_c w_c q_c log softmax(z)_c, averaged over N; with label smoothing q' = (1 - ε) q + ε / C.
    With weights the mean is divided by the mean of Σ_c w_c q_c, so that one-hot targets give PyTorch's weighted mean.
    multilabel: -Σ_c w_c [q_c log σ(z_c) + (1 - q_c) log(1 - σ(z_c))] / C, averaged over N; q' = (1 - ε) q + ε / 2,
    as each label is a decision between two.
    ValueError for a label_smoothing outside 0…1 (1 excluded), class weights of another length, or bad targets.
    Source: label smoothing, Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    num_classes = logits.shape[1]
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing!r}: expected a number in 0…1, without 1")
    if class_weights is not None and class_weights.shape != (num_classes,):
        raise ValueError(f"class_weights of shape {tuple(class_weights.shape)}: expected ({num_classes},)")
    logits, hard = logits.to(torch.float32), soft_targets(targets, num_classes, task)
    if task == "multilabel":
        smooth = hard * (1 - label_smoothing) + label_smoothing / 2 if label_smoothing else hard
        return F.binary_cross_entropy_with_logits(logits, smooth, weight=class_weights)
    smooth = hard * (1 - label_smoothing) + label_smoothing / num_classes if label_smoothing else hard
    if class_weights is None:
        return F.cross_entropy(logits, smooth)
    losses = -(smooth * class_weights * logits.log_softmax(dim=1)).sum(dim=1)
    return losses.sum() / (hard * class_weights).sum()
