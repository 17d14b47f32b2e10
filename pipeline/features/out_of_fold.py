"""Predict the samples of a training by heads that were not fitted on them, so that every label can be checked."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from refract.pipeline.data.folds import groups_of, stratified_folds
from refract.pipeline.data.manifest import Sample
from refract.pipeline.features.heads import Part, fit_candidate, outputs

FOLDS = 5

MOST_FITTED = 20_000
"""Samples on which the head of a fold is fitted, which bounds the time."""


class OutOfFold(NamedTuple):
    """samples: those that have a prediction; logits: float32 (N, C), in their order."""

    samples: list[Sample]
    logits: np.ndarray


def predict_out_of_fold(
    mode: str,
    choice: str,
    part: Part,
    samples: Sequence[Sample],
    contents: Sequence[str],
    *,
    multilabel: bool,
    balanced: bool,
    seed: int,
    doubted: np.ndarray | None = None,
) -> OutOfFold:
    """Divide the samples into FOLDS folds, and predict each fold by a head that is fitted on the others.

    mode, choice: see `refract.pipeline.features.heads`; part: the part of the samples; contents: the contents of each sample; doubted: bool
    (N,), samples on which no head is fitted. The folds are stratified by label, and samples of the same content are in one fold. A sample
    has no prediction if one of its labels occurs in its fold alone.
    """
    groups = groups_of(contents)
    folds = min(FOLDS, len(groups))
    fold_of = np.array(stratified_folds(samples, groups, folds=folds, seed=seed))
    logits = np.zeros(part.targets.shape, np.float32)
    known = np.zeros(len(samples), bool)
    for fold in range(1, folds + 1):
        held, others = np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)
        others = others if doubted is None else others[~doubted[others]]
        if not len(held) or not len(others):
            continue
        others = others[:: -(-len(others) // MOST_FITTED)]
        fitted_on = Part(part.features[others], part.targets[others])
        head = fit_candidate(mode, choice, fitted_on, multilabel=multilabel, balanced=balanced)
        logits[held] = outputs(head, part.features[held]).numpy()
        known[held] = ~(part.targets[held] & ~fitted_on.targets.any(axis=0)).any(axis=1)
    rows = np.flatnonzero(known).tolist()
    return OutOfFold([samples[row] for row in rows], logits[rows])
