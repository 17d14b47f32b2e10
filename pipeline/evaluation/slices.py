"""Measure the predictions on slices of the data: for each value of each metadata column."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from refract.pipeline.data.manifest import Sample

MOST_VALUES = 30
QUARTERS = 4
MISSING = frozenset({"", "na", "n/a", "nan", "nat", "none", "null", "?", "<na>"})
CHANCE = 0.05


@dataclass(frozen=True)
class Slice:
    """The samples whose `column` has `value`.

    right: fraction of right predictions; low, high: its 95 % Wilson interval; worse: whether it is significantly below the fraction of all
    samples, Bonferroni-corrected over all slices.
    """

    column: str
    value: str
    count: int
    right: float
    low: float
    high: float
    worse: bool


def slices(samples: Sequence[Sample], right: np.ndarray) -> list[Slice]:
    """Return the slices of all metadata columns. right: (N,) bool, whether each prediction is right.

    A column with 2 to MOST_VALUES values gives one slice per value. A numeric column with more values gives QUARTERS quantile slices.
    Other columns identify single images and are skipped, as are the row numbers that pandas writes.
    """
    from scipy.stats import binomtest

    columns = list(dict.fromkeys(name for sample in samples for name in sample.metadata))
    parts = []
    for column in columns:
        if re.fullmatch(r"Unnamed: \d+", column):
            continue
        groups, names = _grouped([sample.metadata.get(column, "").strip() for sample in samples])
        members = [(name, groups == group) for group, name in enumerate(names)]
        parts += [(column, name, right[mask]) for name, mask in members if len(names) > 1 and mask.any()]
    rows = []
    for column, name, slice_right in parts:
        test = binomtest(int(slice_right.sum()), len(slice_right))
        interval = test.proportion_ci(method="wilson")
        bound = test.proportion_ci(1 - 2 * CHANCE / len(parts), method="wilson").high
        worse = bool(bound < right.mean())
        fraction, bounds = float(slice_right.mean()), (float(interval.low), float(interval.high))
        rows.append(Slice(column, name, len(slice_right), fraction, *bounds, worse))
    return rows


def _grouped(values: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return (group index of each value, -1 for none; the groups' names). Both are empty for a column that gives no slices."""
    import pandas as pd

    names = sorted(set(values))
    if len(names) <= MOST_VALUES:
        return np.array([names.index(value) for value in values]), [name or "(empty)" for name in names]
    present = pd.Series([None if value.lower() in MISSING else value for value in values], dtype=object)
    numbers = pd.to_numeric(present, errors="coerce").astype(float)
    if (numbers.isna() & present.notna()).any():
        return np.array([]), []
    numbers = numbers.where(np.isfinite(numbers))  # infinite values belong to no quarter
    groups, edges = pd.qcut(numbers, QUARTERS, labels=False, retbins=True, duplicates="drop")
    # Use as many digits as distinguish the edges; a double has 17.
    digits = next((n for n in range(6, 17) if len({f"{edge:.{n}g}" for edge in edges}) == len(edges)), 17)
    names = [f"{low:.{digits}g} … {high:.{digits}g}" for low, high in pairwise(edges)]
    return groups.fillna(-1).astype(int).to_numpy(), names
