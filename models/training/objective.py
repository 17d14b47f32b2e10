"""The loss of a batch. Targets are soft, so that mixed and smoothed labels need no second code path."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from refract.models.layers import pick
from refract.models.tasks import check_task
from refract.models.training.losses import LOSSES, losses_of, resolved_name
from refract.models.training.parameter_groups import decayed_parameter_ids


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


def classification_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    task: str,
    name: str = "auto",
    label_smoothing: float = 0.0,
    gamma: float = 2.0,
    class_weights: Tensor | None = None,
    class_counts: Tensor | None = None,
) -> Tensor:
    """Compute the mean loss of a batch, a float32 scalar.

    logits: (N, C), any float dtype; targets: as in `soft_targets`; class_weights: (C,), at least 0; name: one of LOSSES, or auto;
    class_counts: (C,), the number of training images of each class, for losses that need it.
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
    multilabel, name = task == "multilabel", resolved_name(name, task)
    loss = pick("loss", name, LOSSES)
    if task not in loss.tasks:
        raise ValueError(
            f"loss={name!r} does not support the task {task}; expected one of {', '.join(losses_of(task))}"
        )
    needed = {"gamma": gamma, "multilabel": multilabel, "class_counts": class_counts}
    if class_counts is None and "class_counts" in loss.needs:
        raise ValueError(f"class_counts=None: loss={name!r} needs the number of training images of each class")
    offset = label_smoothing / (2 if multilabel else num_classes)
    smooth = hard * (1 - label_smoothing) + offset if label_smoothing else hard
    terms = loss.terms(logits, smooth, **{need: needed[need] for need in loss.needs})
    if terms.shape != logits.shape:
        raise ValueError(
            f"loss {name!r} returned the shape {tuple(terms.shape)}: expected {tuple(logits.shape)}, each class's term of a sample"
        )
    if multilabel:
        return terms.mean() if class_weights is None else (terms * class_weights).mean()
    if class_weights is not None and loss.weighted_terms:
        return (terms * class_weights).sum() / (hard * class_weights).sum()
    samples = terms.mean(dim=1) if loss.reduction == "mean" else terms.sum(dim=1)
    if class_weights is None:
        return samples.mean()
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

    Source: Zou & Hastie 2005. The weights are those of `refract.models.training.parameter_groups.decayed_parameter_ids`.
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
