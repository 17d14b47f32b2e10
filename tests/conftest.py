"""Settings of all tests: one OpenMP thread per process.

The networks are tiny, and the tests run servers and trainings at the same time. Threads that spin for each other on few cores slow a test
of two seconds down to a minute.
"""

import json
import os
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import charts
import pytest
import warm_process
from hypothesis import settings
from warm_process import Importer, close_shared

os.environ["OMP_NUM_THREADS"] = "1"

# No deadline: on a loaded machine any example may be slow.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


DURATIONS = Path(__file__).with_name("durations.json")
"""Seconds that each test file took, written by `make test-durations`."""

_seconds: defaultdict[str, float] = defaultdict(float)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help="write the seconds of each file to durations.json")


def pytest_configure(config: pytest.Config) -> None:
    """Start the process from which the suite's processes fork commands: see `warm_process`."""
    if not hasattr(config, "workerinput"):
        config.add_cleanup(Importer().close)
    config.add_cleanup(close_shared)  # cleanups run in reverse order


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """Let the processes that run the tests be forks, which need not import what most tests do."""
    for spec in specs:
        if spec.popen and not spec.python:
            spec.python = shlex.join([sys.executable, warm_process.__file__])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long files first: each file runs in one process, and short files fill the end."""
    seconds = json.loads(DURATIONS.read_text("utf-8"))
    items.sort(key=lambda item: -seconds.get(_file(item.nodeid), 0.0))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[_file(report.nodeid)] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--record-durations") and not hasattr(session.config, "workerinput"):
        seconds = {**json.loads(DURATIONS.read_text("utf-8")), **_seconds}  # files that did not run keep their entry
        present = {file: took for file, took in seconds.items() if (DURATIONS.parents[1] / file).is_file()}
        table = {file: round(took, 1) for file, took in sorted(present.items(), key=lambda item: -item[1])}
        DURATIONS.write_text(json.dumps(table, indent=1) + "\n", "utf-8")


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a temporary home: the server stores downloads and the choice of a backend there."""
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session", autouse=True)
def blank_charts() -> None:
    """Leave charts blank, but where `drawn_charts` is used: see `charts`."""
    charts.skip_drawing()


@pytest.fixture
def drawn_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw charts in this test, and in the commands that it starts."""
    monkeypatch.setenv(charts.DRAWN, "1")


@pytest.fixture(scope="session")
def new_tracking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: creating one takes seconds, copying it no time."""
    from refract.pipeline.tracking.database import make_database

    path = tmp_path_factory.mktemp("tracking") / "mlflow.db"
    make_database(f"sqlite:///{path}")
    return path
