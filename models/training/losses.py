"""The losses by name. An entry of LOSSES is all that a new loss needs. Importing this module imports no PyTorch.

`refract.models.training.objective` smooths the targets, calls a loss and reduces its terms.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, signature
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from refract.models.tasks import SINGLE_LABEL, TASKS
from refract.plugins import PluginError, add_entry

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"
"""The name that stands for the default loss of the task."""

NEEDS = ("gamma", "multilabel", "class_counts")
"""The keyword-only arguments that the terms of a loss may have: the focusing parameter; whether the task is multilabel; the number of
training images of each class, float32 (C,)."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss on soft targets. ValueError for an unknown task, reduction or argument.

    - terms: (logits (N, C), soft targets (N, C), some of NEEDS by keyword) → (N, C), each class's term of a sample's loss; float32
    - tasks: the supported tasks, some of TASKS
    - reduction: the reduction of a sample's terms, sum or mean; for multilabel always mean
    - weighted_terms: class weights multiply each term, as in PyTorch's cross-entropy. Else a sample's loss is multiplied by the weight of
      its target. The two differ for smoothed targets.
    """

    terms: "Callable[..., Tensor]"
    tasks: tuple[str, ...] = TASKS
    reduction: Literal["sum", "mean"] = "sum"
    weighted_terms: bool = False

    def __post_init__(self) -> None:
        for key, values, known in (("tasks", self.tasks, TASKS), ("reduction", (self.reduction,), ("sum", "mean"))):
            if isinstance(values, str) or not set(values) <= set(known):
                raise ValueError(f"{key}={getattr(self, key)!r}: expected some of {', '.join(known)}")
        if unknown := set(self.needs) - set(NEEDS):
            raise ValueError(
                f"the keyword-only arguments {', '.join(sorted(unknown))}: expected some of {', '.join(NEEDS)}"
            )

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """The keyword-only arguments that `terms` gets: those of NEEDS, and, in error, others without a default."""
        keyword_only = [p for p in signature(self.terms).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
        return tuple(p.name for p in keyword_only if p.name in NEEDS or p.default is Parameter.empty)


def _cross_entropy(logits: "Tensor", targets: "Tensor") -> "Tensor":
    """Return −q_c log softmax(z)_c."""
    return -targets * logits.log_softmax(dim=1)


def _bce(logits: "Tensor", targets: "Tensor") -> "Tensor":
    """Return −q_c log σ(z_c) − (1 − q_c) log(1 − σ(z_c))."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    return binary_cross_entropy_with_logits(logits, targets, reduction="none")


def _focal(logits: "Tensor", targets: "Tensor", *, multilabel: bool, gamma: float) -> "Tensor":
    """Return each class's term of the cross-entropy times (1 − p)^γ, with p the predicted probability of that term's outcome.

    Source: Lin et al. 2017, arXiv:1708.02002, equation 4.
    """
    if multilabel:
        from torch.nn.functional import logsigmoid

        yes, no = logsigmoid(logits), logsigmoid(-logits)
        return -targets * _complement(yes) ** gamma * yes - (1 - targets) * _complement(no) ** gamma * no
    logs = logits.log_softmax(dim=1)
    return -targets * _complement(logs) ** gamma * logs


def _complement(logs: "Tensor") -> "Tensor":
    """Return 1 − p, at least 1e-6, because a power below 1 has no finite gradient at 0."""
    return (1 - logs.exp()).clamp(min=1e-6)


def _mse(logits: "Tensor", targets: "Tensor", *, multilabel: bool) -> "Tensor":
    """Return (p_c − q_c)², p by softmax or, for multilabel, sigmoid. (The Brier score; SSE is C · N times its mean.)"""
    predicted = logits.sigmoid() if multilabel else logits.softmax(dim=1)
    return (predicted - targets).square()


def _perceptron(logits: "Tensor", targets: "Tensor") -> "Tensor":
    """Return the terms of max_c z_c − Σ_c q_c z_c for each class. Its gradient is the perceptron's learning rule.

    Source: Rosenblatt 1958; Crammer & Singer 2001.
    """
    from torch.nn.functional import one_hot

    best = one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype)
    return (best - targets) * logits


_LOSSES = {
    "cross_entropy": Loss(terms=_cross_entropy, tasks=SINGLE_LABEL, weighted_terms=True),
    "bce": Loss(terms=_bce, reduction="mean"),
    "focal": Loss(terms=_focal),
    "mse": Loss(terms=_mse, reduction="mean"),
    "perceptron": Loss(terms=_perceptron, tasks=SINGLE_LABEL),
}

LOSSES: Mapping[str, Loss] = MappingProxyType(_LOSSES)


def register_loss(name: str, loss: Loss) -> None:
    """Add a loss under a new name, such as that of a plugin. PluginError if a loss has the name or if it is reserved."""
    if name == AUTO:
        raise PluginError(f"loss {name!r}: the name is reserved for the default of the task; rename the loss")
    add_entry("loss", _LOSSES, name, loss)


def loss_names() -> tuple[str, ...]:
    """Return the accepted values of `loss.name`."""
    return (AUTO, *LOSSES)


def losses_of(task: str) -> tuple[str, ...]:
    """Return the accepted values of `loss.name` for a task."""
    return (AUTO, *(name for name, loss in LOSSES.items() if task in loss.tasks))


def resolved_name(name: str, task: str) -> str:
    """Return the loss that `auto` stands for: bce for multilabel, else cross_entropy. Other names stay the same."""
    return name if name != AUTO else "bce" if task == "multilabel" else "cross_entropy"
