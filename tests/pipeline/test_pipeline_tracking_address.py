"""Which addresses and names MLflow takes: refused before the training, or used as they are, wherever the training runs."""

from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from small_data import Run

from refract.pipeline.config.config import ConfigError, config_from_dict
from refract.pipeline.config.sections import TrackingConfig
from refract.pipeline.tracking import Tracker, tracking_uri
from refract.pipeline.tracking.address import absolute, check_address, sqlite_path, sqlite_uri, with_credentials
from refract.pipeline.tracking.journal import Journal


@pytest.mark.parametrize("name", ["team/cats", "cats:v2", "a@b", "a\\b", " cats", "", "..", "é" * 101, "a\nb", "'\""])
def test_a_name_that_cannot_be_registered_is_refused_with_the_config(name: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.model_name: .* is not a name that MLflow, folders and models:/"):
        config_from_dict({"tracking": {"model_name": name}})


@pytest.mark.parametrize("name", ["cats", "o'brien", 'a "b"', "100 %", "Füchse", "a?b#c", "x" * 200])
def test_other_names_are_accepted(name: str) -> None:
    assert config_from_dict({"tracking": {"model_name": name, "experiment": name}}).tracking.model_name == name


@pytest.mark.parametrize("name", [" ", "x" * 251, "a\nb"])
def test_an_experiment_needs_a_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.experiment: .* is not a name of 1 to 250"):
        config_from_dict({"tracking": {"experiment": name}})


@pytest.mark.parametrize("uri", ["./mlruns", "mlruns", "/tmp/mlruns", "file:///tmp/mlruns", "file:mlruns"])
def test_a_folder_is_refused_with_the_variable_that_allows_it(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(ConfigError, match=r"MLFLOW_ALLOW_FILE_STORE=true; use sqlite:///mlflow\.db, or .*migrate-file"):
        check_address(uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_address(uri)


def test_addresses_that_may_answer_are_accepted_and_a_missing_driver_is_named() -> None:
    for uri in (
        "http://h:5000",
        "https://u:p@h",
        "databricks",
        "databricks://profile",
        "sqlite:///a.db",
        "other-plugin://x",
    ):
        check_address(uri)
    with pytest.raises(ConfigError, match=r"postgresql\+nothing://\*\*\*@h/d cannot be used \("):
        check_address("postgresql+nothing://u:secret@h/d")


def test_a_folder_is_refused_before_the_data_are_read(refract: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {source: nowhere}\n")
    printed = refract("train", "c.yaml", "--tracking.uri", "./mlruns", code=2)
    assert "./mlruns is a folder" in printed.stderr and not (tmp_path / "runs").exists()


def test_the_path_of_a_database_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plain", "a%2Fb", "q?x", "per%cent#ü y"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        uri = absolute("sqlite:///mlflow.db?timeout=60")
        assert sqlite_path(uri) == Path.cwd() / "mlflow.db" and uri.endswith("?timeout=60")
        assert absolute(uri) == uri and sqlite_path(sqlite_uri(Path.cwd() / "x.db")) == Path.cwd() / "x.db"
    for other in ("sqlite:///:memory:", "http://h/?a=1", "sqlite://"):
        assert absolute(other) == other and sqlite_path(other) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["feature%2Fx", "q?x"])
def test_a_run_is_registered_from_a_folder_of_any_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy and MLflow both decode %XX; the model's name has a quote, which MLflow's filters do not escape."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    run_dir = Path("r")
    (run_dir / "bundle").mkdir(parents=True)
    (run_dir / "bundle" / "bundle.json").write_text("{}")
    one = Tracker(TrackingConfig(), run_dir, {}, {})
    one.log_files([], run_dir / "bundle")
    one.register("o'brien", "champion")
    assert one.finish("FINISHED") == 0 and one.journal.delivered["version"] == "1"
    assert {path.name for path in Path().iterdir()} == {"mlflow.db", "mlruns", "r"}
    assert {path.name for path in tmp_path.iterdir()} == {name}
    client = MlflowClient("sqlite:///mlflow.db", "sqlite:///mlflow.db")
    version = client.get_model_version_by_alias("o'brien", "champion")
    folder = mlflow.artifacts.download_artifacts(
        version.source, dst_path=str(tmp_path), tracking_uri="sqlite:///mlflow.db"
    )
    assert [path.name for path in Path(folder).iterdir()] == ["bundle.json"]


def test_credentials_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:secret@h")
    assert with_credentials("http://***@h") == tracking_uri(TrackingConfig(uri="http://***@h")) == "http://u:secret@h"
    with pytest.raises(ConfigError, match=r"http://\*\*\*@other has no credentials here; set MLFLOW_TRACKING_URI"):
        with_credentials("http://***@other")
    assert config_from_dict({"tracking": {"uri": "http://u:secret@h"}}).to_dict()["tracking"]["uri"] == "http://***@h"


def test_the_journal_keeps_no_credentials_and_knows_the_server_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.for_server("http://u:secret@h")
    journal.append({"do": "start"})
    journal.mark(run_id="1")
    assert "secret" not in (tmp_path / "journal.delivered.json").read_text()
    again = Journal(tmp_path)
    again.for_server("http://u:another@h")
    assert not again.waiting()
    again.for_server("http://elsewhere")
    assert again.waiting()
