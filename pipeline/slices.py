"""How good the answers are for parts of the data: for each value of each metadata column."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.manifest import Sample

MOST_VALUES = 30
QUARTERS = 4


@dataclass(frozen=True)
class Slice:
    """The samples whose `column` has `value`. right: the share that is answered right; low, high: its 95 % Wilson interval; worse: whether
    that interval lies below the share of all samples together."""

    column: str
    value: str
    count: int
    right: float
    low: float
    high: float
    worse: bool


def slices(samples: Sequence[Sample], right: np.ndarray) -> list[Slice]:
    """right: (N,) bool. A column of 2 to MOST_VALUES values is taken as it is; one of more, where all are numbers, by its quarters; others
    tell single pictures apart and are left out."""
    from scipy.stats import binomtest

    columns = list(dict.fromkeys(name for sample in samples for name in sample.metadata))
    found = []
    for column in columns:
        groups, names = _grouped([sample.metadata.get(column, "").strip() for sample in samples])
        for group, name in enumerate(names if len(names) > 1 else ()):
            own = right[groups == group]
            interval = binomtest(int(own.sum()), len(own)).proportion_ci(method="wilson")
            low, high = float(interval.low), float(interval.high)
            worse = bool(high < right.mean())
            found.append(Slice(column, name or "(empty)", len(own), float(own.mean()), low, high, worse))
    return found


def _grouped(values: list[str]) -> tuple[np.ndarray, list[str]]:
    """(each value's place among the groups, -1 for none; the groups' names); no groups where none make sense."""
    import pandas as pd

    names = sorted(set(values))
    if len(names) <= MOST_VALUES:
        return np.array([names.index(value) for value in values]), names
    numbers = pd.to_numeric(pd.Series(values, dtype=object).replace("", None), errors="coerce")
    if numbers.isna().sum() > values.count(""):
        return np.array([]), []
    quarters = pd.qcut(numbers, QUARTERS, duplicates="drop").cat.remove_unused_categories()
    return quarters.cat.codes.to_numpy(), [str(quarter) for quarter in quarters.cat.categories]
