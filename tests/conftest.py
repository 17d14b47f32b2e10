"""For every test: one OpenMP thread a process. The networks are tiny, and the tests start servers and trainings beside each other; threads
that spin for each other on few cores make a test of two seconds last a minute."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"

# A loaded machine makes any example late.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: each goes to one process as a whole, and short ones fill up the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A home of the tests' own: the server keeps downloads and the choice of a backend there."""
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def new_tracking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database as it is when nothing was tracked: making one takes seconds, copying it nothing."""
    from refract.pipeline.tracking.database import make_database

    path = tmp_path_factory.mktemp("tracking") / "mlflow.db"
    make_database(f"sqlite:///{path}")
    return path
