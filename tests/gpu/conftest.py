"""Tests marked `gpu` run on a GPU, and are skipped without one. REFRACT_TEST_DEVICE=cpu runs their logic on the processor."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: deterministic matrix products

sys.path.append(str(Path(__file__).parents[1] / "augment"))  # the ops' parameters are those of the tests there

DEVICE = os.environ.get("REFRACT_TEST_DEVICE") or "cuda"


def _missing() -> str | None:
    """Why the tests cannot run here."""
    if DEVICE == "cpu":
        return None
    import torch

    return None if torch.cuda.is_available() else "needs a GPU; REFRACT_TEST_DEVICE=cpu tests the logic without one"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _missing()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> str:
    """cuda, or cpu where REFRACT_TEST_DEVICE says so."""
    return DEVICE
