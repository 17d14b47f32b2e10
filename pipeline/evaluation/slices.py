"""How good the answers are for parts of the data: for each value of each metadata column."""

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
    """The samples whose `column` has `value`. right: the share that is answered right; low, high: its 95 % Wilson interval; worse: whether
    it lies below the share of all samples by more than chance, as many parts as were looked at (Bonferroni)."""

    column: str
    value: str
    count: int
    right: float
    low: float
    high: float
    worse: bool


def slices(samples: Sequence[Sample], right: np.ndarray) -> list[Slice]:
    """right: (N,) bool. A column of 2 to MOST_VALUES values is taken as it is; one of more, where all are finite numbers, by its quarters;
    others tell single images apart and are left out, as are the row numbers that pandas writes."""
    from scipy.stats import binomtest

    columns = list(dict.fromkeys(name for sample in samples for name in sample.metadata))
    parts = []
    for column in columns:
        if re.fullmatch(r"Unnamed: \d+", column):
            continue
        groups, names = _grouped([sample.metadata.get(column, "").strip() for sample in samples])
        members = [(name, groups == group) for group, name in enumerate(names)]
        parts += [(column, name, right[own]) for name, own in members if len(names) > 1 and own.any()]
    found = []
    for column, name, own in parts:
        test = binomtest(int(own.sum()), len(own))
        interval = test.proportion_ci(method="wilson")
        bound = test.proportion_ci(1 - 2 * CHANCE / len(parts), method="wilson").high
        worse = bool(bound < right.mean())
        found.append(Slice(column, name, len(own), float(own.mean()), float(interval.low), float(interval.high), worse))
    return found


def _grouped(values: list[str]) -> tuple[np.ndarray, list[str]]:
    """(each value's place among the groups, -1 for none; the groups' names); no groups where none make sense."""
    import pandas as pd

    names = sorted(set(values))
    if len(names) <= MOST_VALUES:
        return np.array([names.index(value) for value in values]), [name or "(empty)" for name in names]
    given = pd.Series([None if value.lower() in MISSING else value for value in values], dtype=object)
    numbers = pd.to_numeric(given, errors="coerce").astype(float)
    if (numbers.isna() & given.notna()).any():
        return np.array([]), []
    numbers = numbers.where(np.isfinite(numbers))  # what is infinite is in no quarter
    groups, edges = pd.qcut(numbers, QUARTERS, labels=False, retbins=True, duplicates="drop")
    # As many digits as tell the edges apart; a double has 17.
    digits = next((n for n in range(6, 17) if len({f"{edge:.{n}g}" for edge in edges}) == len(edges)), 17)
    names = [f"{low:.{digits}g} … {high:.{digits}g}" for low, high in pairwise(edges)]
    return groups.fillna(-1).astype(int).to_numpy(), names
