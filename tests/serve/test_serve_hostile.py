"""Untrusted input. `python -m benchmarks.hostile` repeats it, measures the memory, and adds schemathesis."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from benchmarks.corpus import cases
from benchmarks.corpus.valid import odd_but_valid
from benchmarks.hostile import tried
from refract.serve.http.app import create_app

DEADLINE_S = 30
"""Longer than the server's default of 10 s, in which a loaded machine may not decode 40 megapixels."""


@pytest.mark.slow
def test_hostile_inputs_are_rejected_and_unusual_images_are_predicted(bundle, serving) -> None:
    corpus = [*cases(), *odd_but_valid(np.random.default_rng(1))]
    assert len(corpus) > 2_000
    with serving(create_app(bundle, deadline_s=DEADLINE_S)) as client, ThreadPoolExecutor(4) as pool:
        url = str(client.base_url).rstrip("/")
        outcomes = list(pool.map(lambda case: tried(url, case, "shapes"), corpus))
    assert [f"{case.name}: {fault}" for case, (_, _, fault) in zip(corpus, outcomes, strict=True) if fault] == []
    assert max(seconds for _, seconds, _ in outcomes) < DEADLINE_S + 2, "nothing outlasts its deadline"
