"""Requests that strangers send, damaged and hostile ones. Made from a seed, nothing is stored."""

import numpy as np

from benchmarks.corpus import files, requests
from benchmarks.corpus.case import Case


def cases(seed: int = 0) -> list[Case]:
    """Some two and a half thousand."""
    rng = np.random.default_rng(seed)
    return [*files.cases(rng), *requests.cases(rng)]
