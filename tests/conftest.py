"""For every test: one OpenMP thread a process. The networks are tiny, and the tests start servers and trainings beside each other; threads
that spin for each other on few cores make a test of two seconds last a minute."""

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def new_tracking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database as it is when nothing was tracked: making one takes seconds, copying it nothing."""
    from pipeline.tracking.database import make_database

    path = tmp_path_factory.mktemp("tracking") / "mlflow.db"
    make_database(f"sqlite:///{path}")
    return path
