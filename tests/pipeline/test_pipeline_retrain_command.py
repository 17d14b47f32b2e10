"""`refract retrain` as a process: its signals, its further ranks, and errors of MLflow in a step."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.exceptions import MlflowException

from refract.pipeline.cli import retrain
from refract.pipeline.config.config import Config, load_config
from refract.pipeline.retraining.run import begin
from refract.pipeline.retraining.steps import Outcome, RetrainingError, run_steps
from refract.pipeline.retraining.workspace import read_run, workspace_of
from refract.pipeline.training.run_directory import write_config


@pytest.fixture
def file(tmp_path: Path, new_tracking: Path) -> Path:
    """Return a config file."""
    shutil.copy(new_tracking, tmp_path)
    values = {
        "trainer": {"runs_dir": str(tmp_path / "runs")},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db", "model_name": "colors"},
        "retrain": {"folder": str(tmp_path / "retrain")},
    }
    path = tmp_path / "colors.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def config(file: Path) -> Config:
    return load_config(file)


def test_an_error_of_mlflow_names_the_step_and_the_address(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any) -> None:
        raise MlflowException("API request failed\nwith details")

    folder = begin(config, force=False)
    monkeypatch.setattr("refract.pipeline.retraining.champion_data.registry_of", unreachable)
    with pytest.raises(RetrainingError, match=r"^step snapshot: MLflow at sqlite:///.* failed: API request failed$"):
        run_steps(folder)
    assert read_run(folder).keys() == {"run", "force", "began", "attempts"}


def test_a_further_rank_joins_the_training_of_rank_0(
    file: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning starts it by the command line of rank 0, which holds the workspace's lock."""
    joined = []
    monkeypatch.setattr(
        "refract.pipeline.training.run.train", lambda config, *, resume: joined.append((config, resume))
    )
    folder = begin(config, force=False)
    run = tmp_path / "runs" / f"colors-{folder.name}"
    run.mkdir(parents=True)
    write_config(config.changed({"trainer.max_epochs": 7}), run)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with workspace_of(config).held():
        assert retrain.main([str(file)]) == 0
    ((joined_config, joined_run),) = joined
    assert joined_run == run and joined_config.trainer.max_epochs == 7
    assert read_run(folder).keys() == {"run", "force", "began"}, "rank 0 writes the record"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_step_without_counting_the_attempt(
    file: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def receive(*_: Any) -> None:
        try:
            signal.raise_signal(number)
        except Exception:
            pytest.fail("the step took the signal for a failure")

    monkeypatch.setattr("refract.pipeline.retraining.snapshot.take", receive)
    handler = signal.getsignal(number)
    assert retrain.main([str(file)]) == Outcome.FAILED
    assert signal.getsignal(number) is handler
    assert "was stopped; resume it with `refract retrain --resume " in capsys.readouterr().err
    (folder,) = workspace_of(config).runs()
    assert read_run(folder)["attempts"] == 0


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_in_a_training_stops_the_run(
    file: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_once(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("refract.pipeline.retraining.snapshot.take", at_once)
    assert retrain.main([str(file)]) == Outcome.FAILED
    assert "was stopped; resume it with" in capsys.readouterr().err
    (folder,) = workspace_of(config).runs()
    assert read_run(folder)["attempts"] == 0
