"""Bundles by folder and by name in a real MLflow registry (SQLite)."""

import os
import socket
import subprocess
import sys

import pytest

from models.bundle import load_bundle
from serve.source import SourceError, resolve


def test_a_folder_is_itself(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/at/all", "no such folder"),
        ("models:/shapes", "neither models:/NAME@ALIAS nor models:/NAME/VERSION"),
        ("models:/shapes/latest", "neither"),
        ("models:/../x@y", "neither"),
    ],
)
def test_a_source_that_names_nothing(source, message):
    with pytest.raises(SourceError, match=message):
        resolve(source)


def test_without_a_server_or_a_database_it_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"no mlflow\.db in .*; set MLFLOW_TRACKING_URI"):
        resolve("models:/shapes@champion")
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("last-")] == []


@pytest.fixture(scope="module")
def registry(bundle, tmp_path_factory) -> str:
    """A tracking URI whose registry holds `bundle` as version 1 of shapes, the champion; the pipeline's calls."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.create_experiment("shapes", artifact_location=(folder / "artifacts").as_uri())
    run = client.create_run(experiment)
    client.log_artifacts(run.info.run_id, str(bundle.path), "bundle")
    client.create_registered_model("shapes")
    source = f"{run.info.artifact_uri}/bundle"
    version = client.create_model_version("shapes", source=source, run_id=run.info.run_id)
    client.set_registered_model_alias("shapes", "champion", version.version)
    return uri


def test_a_registered_version_is_downloaded_once(registry, bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    champion = resolve("models:/shapes@champion", cache=tmp_path)
    assert load_bundle(champion).digest == bundle.digest
    written = (champion / "bundle.json").stat().st_mtime_ns
    assert resolve("models:/shapes/1", cache=tmp_path) == champion
    assert (champion / "bundle.json").stat().st_mtime_ns == written
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("last-")] == [champion]


def test_a_cache_that_cannot_be_written(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    (tmp_path / "file").write_text("in the way")  # root may write to any folder
    with pytest.raises(SourceError, match="downloads go to .*cache, which cannot be written"):
        resolve("models:/shapes@champion", cache=tmp_path / "file" / "cache")


@pytest.mark.parametrize("source", ["models:/circles@champion", "models:/shapes@challenger", "models:/shapes/7"])
def test_an_unknown_model_alias_or_version(registry, tmp_path, monkeypatch, source):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    with pytest.raises(SourceError, match="no such model, version or alias"):
        resolve(source, cache=tmp_path)
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("last-")] == []


@pytest.mark.slow
def test_a_server_that_is_down(tmp_path):
    """In a process of its own: MLflow reads its settings once."""
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code = "import sys, serve.source as s\ntry: s.resolve('models:/a@b')\nexcept s.SourceError as e: print(e)"
        environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert f"the tracking server does not answer at {uri}" in done.stdout, done.stderr
