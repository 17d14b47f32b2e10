"""Settings of all tests: one OpenMP thread per process.

The networks are tiny, and the tests run servers and trainings at the same time. Threads that spin for each other on few cores slow a test
of two seconds down to a minute.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"

# No deadline: on a loaded machine any example may be slow.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: each file runs in one process, and short files fill the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a temporary home: the server stores downloads and the choice of a backend there."""
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def new_tracking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: creating one takes seconds, copying it no time."""
    from refract.pipeline.tracking.database import make_database

    path = tmp_path_factory.mktemp("tracking") / "mlflow.db"
    make_database(f"sqlite:///{path}")
    return path
