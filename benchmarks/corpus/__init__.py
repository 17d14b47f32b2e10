"""Untrusted requests: damaged and hostile ones. They are built from a seed; nothing is stored."""

import numpy as np

from benchmarks.corpus import files, requests
from benchmarks.corpus.case import Case


def cases(seed: int = 0) -> list[Case]:
    """Return about 2,500 cases."""
    rng = np.random.default_rng(seed)
    return [*files.cases(rng), *requests.cases(rng)]
