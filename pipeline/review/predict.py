"""Predict the images of a review by a logistic regression on their embeddings, each labelled image by one that has not seen its label."""

from collections.abc import Sequence

import numpy as np
import torch

from refract.pipeline.data.manifest import Sample
from refract.pipeline.features.heads import Part, fit_candidate, fit_head, outputs
from refract.pipeline.features.out_of_fold import predict_out_of_fold
from refract.pipeline.review.queues.label_errors import doubt

CHOSEN_ON = 4000
"""Items, drawn at random, on which the regularisation is chosen, which bounds the time."""

DOUBTED = 0.1
"""Fraction of the items on which the second pass of `robust_out_of_fold` does not fit."""


def choose(part: Part, *, multilabel: bool) -> str:
    """Choose the regularisation on a fifth of the items, which are drawn at random."""
    order = np.random.default_rng(0).permutation(len(part.features))[:CHOSEN_ON]
    cut = max(1, len(order) // 5)
    train, val = (Part(part.features[rows], part.targets[rows]) for rows in (order[cut:], order[:cut]))
    return fit_head("probe", train, val, multilabel=multilabel).choice


def predict(choice: str, part: Part, vectors: np.ndarray, *, multilabel: bool) -> np.ndarray:
    """Return the probabilities float32 (K, C) of other embeddings (K, D) by a head that is fitted on `part`."""
    head = fit_candidate("probe", choice, part, multilabel=multilabel)
    return _probabilities(outputs(head, vectors), multilabel=multilabel)


def robust_out_of_fold(
    choice: str, part: Part, samples: Sequence[Sample], contents: Sequence[str], *, multilabel: bool
) -> np.ndarray:
    """Return each item's probabilities by heads that were not fitted on it, float32 (N, C).

    A row is NaN if one of the item's labels occurs in its fold alone. The second pass fits the heads without the DOUBTED fraction of the
    items whose labels the first pass contradicts most: see `benchmarks.loop`, stage label-errors, for what it gains.
    """
    first = out_of_fold(choice, part, samples, contents, multilabel=multilabel)
    scores = doubt(first, part.targets, multilabel=multilabel)
    doubted = np.zeros(len(samples), bool)
    doubted[np.argsort(-scores, kind="stable")[: int(DOUBTED * len(samples))]] = True
    second = out_of_fold(choice, part, samples, contents, multilabel=multilabel, doubted=doubted)
    return np.where(np.isnan(second), first, second)


def out_of_fold(
    choice: str,
    part: Part,
    samples: Sequence[Sample],
    contents: Sequence[str],
    *,
    multilabel: bool,
    doubted: np.ndarray | None = None,
) -> np.ndarray:
    """Return float32 (N, C) as `robust_out_of_fold`, in one pass. doubted: see `predict_out_of_fold`."""
    predictions = predict_out_of_fold(
        "probe", choice, part, samples, contents, multilabel=multilabel, balanced=False, seed=0, doubted=doubted
    )
    rows = np.full(part.targets.shape, np.nan, np.float32)
    row_of = {sample.path: row for row, sample in enumerate(samples)}
    places = [row_of[sample.path] for sample in predictions.samples]
    rows[places] = _probabilities(torch.from_numpy(predictions.logits), multilabel=multilabel)
    return rows


def _probabilities(logits: torch.Tensor, *, multilabel: bool) -> np.ndarray:
    return (logits.sigmoid() if multilabel else logits.softmax(dim=1)).numpy()
