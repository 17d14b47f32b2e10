"""Fit the head of a network on embeddings: logistic regression, nearest neighbours, class means."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refract.models.head import CosineHead, NeighbourHead

STRENGTHS = tuple(10.0**power for power in range(-4, 1))
"""Inverse regularisation strengths C of the logistic regression, for embeddings with a mean square of 1, strongest first."""

MOST_STEPS, TOLERANCE = 100, 3e-4
"""Of L-BFGS, for each strength: number of steps, and the largest component of the gradient at which it stops."""

NEIGHBOURS = (1, 3, 5, 10, 20, 50)

SCALES = (5.0, 10.0, 20.0, 50.0)
"""Scales of the cosine similarities to the class means."""

MEASURED = 2000
"""Training samples on which the chosen head is measured."""

CHUNK = 4096
"""Samples that a head predicts at once: nearest neighbours need memory for the similarities to all training samples."""


class Part(NamedTuple):
    """Embeddings float32 (N, D), and targets bool (N, C)."""

    features: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """head: in eval mode, maps (N, D) to logits (N, C); choice: the chosen setting, for the log; metrics: loss and accuracy on both sets,
    for multi-label the fraction of right decisions and `val_average_precision`, the mean over the labels.
    """

    head: nn.Module
    choice: str
    metrics: dict[str, float]


class Candidate(NamedTuple):
    choice: str
    head: nn.Module


def fit_head(mode: str, train: Part, val: Part, *, multilabel: bool, balanced: bool = False) -> Fitted:
    """Fit all candidates of the mode on `train`, and choose one on `val`.

    mode: a name of MODES. balanced: weigh the classes by their inverse frequency (`probe`). The chosen candidate is the simplest whose
    validation loss lies within one standard error of the lowest, as few validation images distinguish little (Breiman et al. 1984,
    "Classification and regression trees", section 3.4.3). Without validation images it is the middle candidate.
    """
    candidates: list[Candidate] = []
    losses: list[np.ndarray] = []
    for candidate in MODES[mode](train, multilabel, balanced):
        candidates.append(candidate)
        losses.append(_losses(candidate.head, val, multilabel))
        if _rises(losses):
            break
    chosen = _simplest(losses)
    head = candidates[chosen].head.eval()
    row = {}
    for name, part in (("train", Part(*(values[:: -(-len(values) // MEASURED)] for values in train))), ("val", val)):
        if len(part.features):
            row[f"{name}_loss"] = float(_losses(head, part, multilabel).mean())
            row[f"{name}_accuracy"] = float(_right(head, part, multilabel).mean())
    if multilabel:
        row["val_average_precision"] = _average_precision(head, val)
    return Fitted(head, candidates[chosen].choice, row)


def fit_candidate(mode: str, choice: str, part: Part, *, multilabel: bool, balanced: bool = False) -> nn.Module:
    """Fit the candidate `choice` of the mode alone; the first one if there is none of this name, as for more neighbours than samples."""
    candidates = MODES[mode](part, multilabel, balanced)
    first = candidate = next(candidates)
    while candidate.choice != choice and (following := next(candidates, None)) is not None:
        candidate = following
    return (candidate if candidate.choice == choice else first).head.eval()


def _rises(losses: Sequence[np.ndarray]) -> bool:
    """Whether the last two candidates are worse than the best by more than a standard error, so that further ones are not tried."""
    if len(losses) < 3 or not len(losses[0]):
        return False
    best = min(losses, key=lambda row: float(row.mean()))
    return all(_excess(row, best) > 0 for row in losses[-2:])


def _simplest(losses: Sequence[np.ndarray]) -> int:
    """Return the index of the first row whose mean lies within one standard error of the lowest mean."""
    if not len(losses[0]):
        return len(losses) // 2
    best = min(losses, key=lambda row: float(row.mean()))
    return next(index for index, row in enumerate(losses) if _excess(row, best) <= 0)


def _excess(row: np.ndarray, best: np.ndarray) -> float:
    """Return by how much the mean of `row` exceeds that of `best`, less the standard error of the paired difference."""
    difference = row - best
    return float(difference.mean() - difference.std() / np.sqrt(len(row)))


def outputs(head: nn.Module, features: np.ndarray) -> Tensor:
    """Return the logits (N, C) of embeddings float32 (N, D)."""
    with torch.inference_mode():
        return torch.cat([head(rows) for rows in torch.from_numpy(features).split(CHUNK)])


def _losses(head: nn.Module, part: Part, multilabel: bool) -> np.ndarray:
    """Return the negative log-likelihood of each sample, the mean over the labels for multi-label."""
    if not len(part.features):  # without samples the number of features is unknown
        return np.zeros(0, np.float32)
    logits, targets = outputs(head, part.features), torch.from_numpy(part.targets).float()
    if multilabel:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1).numpy()
    return -(logits.log_softmax(dim=1) * targets).sum(dim=1).numpy()


def _right(head: nn.Module, part: Part, multilabel: bool) -> np.ndarray:
    logits = outputs(head, part.features).numpy()
    if multilabel:
        return ((logits >= 0) == part.targets).mean(axis=1)
    return part.targets[np.arange(len(logits)), logits.argmax(axis=1)]


def _average_precision(head: nn.Module, part: Part) -> float:
    """Return the mean of the average precisions of the labels that occur, 0 if none does."""
    from sklearn.metrics import average_precision_score

    seen = part.targets.any(axis=0)
    if not seen.any():
        return 0.0
    return float(average_precision_score(part.targets[:, seen], outputs(head, part.features).numpy()[:, seen]))


def _probes(train: Part, multilabel: bool, balanced: bool) -> Iterator[Candidate]:
    """Logistic regression by L-BFGS: multinomial, or one for each label. Each strength starts from the weights of the stronger one.

    The multinomial form has no intercept. With one image per class of two, that was right for 78 % of 153 photos instead of 66 %, and with
    5 to 50 images it made no difference of more than 1 % on two folders (five seeds, as in `benchmarks.features`, stage few-images).
    """
    scale = float(np.sqrt((train.features**2).mean())) or 1.0
    features, targets = torch.from_numpy(train.features / np.float32(scale)), torch.from_numpy(train.targets).float()
    weights = torch.ones_like(targets)
    if balanced and multilabel:
        positive = targets.mean(dim=0).clamp(1 / len(targets), 1 - 1 / len(targets))
        weights = torch.where(targets > 0, 0.5 / positive, 0.5 / (1 - positive))
    elif balanced:
        weights = targets / targets.sum(dim=0).clamp(min=1) * len(targets) / targets.shape[1]
        weights = weights.sum(dim=1, keepdim=True).expand_as(targets)
    head = nn.Linear(features.shape[1], targets.shape[1])
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    head.bias.requires_grad_(multilabel)
    for strength in STRENGTHS:
        _minimise(head, features, targets, weights, 1 / (strength * len(features)), multilabel)
        fitted = copy.deepcopy(head).requires_grad_(True)
        with torch.no_grad():
            fitted.weight /= scale
        yield Candidate(f"C = {strength:g}", fitted)


def _minimise(
    head: nn.Linear, features: Tensor, targets: Tensor, weights: Tensor, penalty: float, multilabel: bool
) -> None:
    """Minimise the weighted mean loss + penalty · ‖W‖² / 2 over the head's parameters, in place. The bias has no penalty."""
    optimizer = torch.optim.LBFGS(
        [parameter for parameter in head.parameters() if parameter.requires_grad],
        max_iter=MOST_STEPS,
        tolerance_grad=TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = head(features)
        if multilabel:
            loss = F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="none").sum(dim=1).mean()
        else:
            loss = -(logits.log_softmax(dim=1) * targets * weights).sum(dim=1).mean()
        loss = loss + penalty / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def _neighbours(train: Part, multilabel: bool, balanced: bool) -> Iterator[Candidate]:
    """A weighted vote of the nearest training samples, most neighbours first. Source: see `refract.models.head.NeighbourHead`."""
    for count in reversed(NEIGHBOURS):
        if count <= len(train.features):
            head = NeighbourHead(train.features.shape[1], train.targets.shape[1])
            head.remember(
                torch.from_numpy(train.features), torch.from_numpy(train.targets), count, multilabel=multilabel
            )
            yield Candidate(f"{count} neighbours", head)


def _prototypes(train: Part, multilabel: bool, balanced: bool) -> Iterator[Candidate]:
    """The cosine similarity to the mean direction of each class (Snell et al. 2017, arXiv:1703.05175, section 2.3).

    Deviation: the similarity is the cosine, as in Gidaris & Komodakis 2018, arXiv:1804.09458.
    """
    if multilabel:
        raise ValueError(
            "model.mode: prototype needs one label per image; for multi-label set model.mode: probe or knn"
        )
    directions = F.normalize(torch.from_numpy(train.features), dim=1)
    targets = torch.from_numpy(train.targets).float()
    means = F.normalize((targets.T @ directions) / targets.sum(dim=0).clamp(min=1)[:, None], dim=1)
    for scale in SCALES:
        head = CosineHead(train.features.shape[1], train.targets.shape[1])
        with torch.no_grad():
            head.weight.copy_(means)
            head.scale.fill_(scale)
        yield Candidate(f"scale {scale:g}", head)


MODES: Mapping[str, Callable[[Part, bool, bool], Iterator[Candidate]]] = MappingProxyType(
    {"probe": _probes, "knn": _neighbours, "prototype": _prototypes}
)
"""model.mode → its candidates, the simplest first."""
