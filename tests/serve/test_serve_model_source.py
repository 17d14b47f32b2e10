"""Bundles are resolved from a folder, and from a name in a real MLflow registry (SQLite)."""

import contextlib
import hashlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm_process import shared

from refract.models.bundle.bundle import load_bundle
from refract.serve.rollout import model_source
from refract.serve.rollout.model_source import SourceError, resolve


def test_a_folder_resolves_to_itself(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/at/all", "no such folder"),
        ("models:/shapes", "is not a valid source; expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/shapes/latest", "is not a valid source"),
        ("models:/../x@y", "is not a valid source"),
    ],
)
def test_an_invalid_source_is_rejected(source, message):
    with pytest.raises(SourceError, match=message):
        resolve(source)


def test_a_missing_server_and_database_is_reported(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"no mlflow\.db in .*; set MLFLOW_TRACKING_URI"):
        resolve("models:/shapes@champion")
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("last-")] == []


def test_a_damaged_download_stays_if_no_new_one_is_available(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    damaged = tmp_path / "cache" / "shapes-1"
    damaged.mkdir(parents=True)
    (damaged / "bundle.json").touch()
    with pytest.raises(SourceError, match=r"no mlflow\.db in "):
        model_source.download_again("models:/shapes@champion", damaged)
    assert (damaged / "bundle.json").exists()


@pytest.fixture(scope="module")
def registry(bundle, tmp_path_factory, new_tracking) -> str:
    """A tracking URI whose registry has `bundle` as version 1 of shapes, the champion, registered with the pipeline's calls."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copy(new_tracking, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    experiment = client.create_experiment("shapes", artifact_location=(folder / "artifacts").as_uri())
    run = client.create_run(experiment)
    client.log_artifacts(run.info.run_id, str(bundle.path), "bundle")
    client.create_registered_model("shapes")
    bundle_uri = f"{run.info.artifact_uri}/bundle"
    version = client.create_model_version("shapes", source=bundle_uri, run_id=run.info.run_id)
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


def test_a_read_only_cache_is_reported(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    (tmp_path / "file").write_text("in the way")  # a file, as root may write to any folder
    with pytest.raises(SourceError, match="the download folder .*cache is not writable"):
        resolve("models:/shapes@champion", cache=tmp_path / "file" / "cache")


@pytest.mark.parametrize("source", ["models:/circles@champion", "models:/shapes@challenger", "models:/shapes/7"])
def test_an_unknown_model_alias_or_version(registry, tmp_path, monkeypatch, source):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    with pytest.raises(SourceError, match="no such model, version or alias"):
        resolve(source, cache=tmp_path)
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("last-")] == []


def aged(path: Path, days: float) -> Path:
    if not path.exists():
        path.mkdir()
    os.utime(path, (time.time() - days * 86_400,) * 2)
    return path


def test_a_download_removes_long_unused_versions(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    days = {1: 50, 2: 40, 3: 90, 4: 27, 5: 28, 6: 60, 7: 29}
    versions = {version: aged(tmp_path / f"shapes-{version}-0123456789ab", ago) for version, ago in days.items()}
    others = [aged(tmp_path / name, 90) for name in ("a-b-1-0123456789ab", "a-b-2-0123456789ab", "mine", "shapes-7")]
    (tmp_path / "last-0123456789ab").write_text(versions[3].name)
    killed, going = aged(tmp_path / ".download-killed", 2), aged(tmp_path / ".download-going", 0.5)
    (tmp_path / ".last-killed.1").write_text("")
    half = aged(tmp_path / ".last-killed.1", 2)
    champion = resolve("models:/shapes@champion", cache=tmp_path)
    assert not killed.exists() and not half.exists() and going.exists()
    assert champion.exists() and all(path.exists() for path in others), (
        "three of a model at most, and what is no version"
    )
    left = {version for version, path in versions.items() if path.exists()}
    assert left == {3, 4, 5, 7}, "recently used, or the last known version of a name"


def test_a_used_version_is_not_removed(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
    champion = resolve("models:/shapes/1", cache=tmp_path)
    os.utime(champion, (0, 0))
    assert resolve("models:/shapes@champion", cache=tmp_path) == champion
    assert time.time() - champion.stat().st_mtime < 60


@contextlib.contextmanager
def dripping() -> Iterator[str]:
    """The address of a server that sends single bytes slowly."""
    stop = threading.Event()

    def drip(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
            while not stop.wait(0.2):
                connection.sendall(b" ")

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=drip, args=(listening.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            stop.set()
            listening.shutdown(socket.SHUT_RDWR)


def test_a_server_that_sends_single_bytes_counts_as_unreachable(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(model_source, "LOOK_S", 1)
    with dripping() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(SourceError, match="does not answer at .*no data received for 1 s"):
            resolve("models:/shapes@champion", cache=tmp_path)
        known = tmp_path / "shapes-1-0123456789ab"
        known.mkdir()
        asked = hashlib.sha256(f"{uri} models:/shapes@champion".encode()).hexdigest()[:12]
        (tmp_path / f"last-{asked}").write_text(known.name)
        assert resolve("models:/shapes@champion", cache=tmp_path) == known


@pytest.mark.slow
def test_a_start_and_a_watcher_time_out_on_a_server_that_sends_single_bytes(tmp_path):
    """The timeouts are those of production."""
    with dripping() as uri:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "HOME": str(tmp_path)}
        follow = (
            "import asyncio, refract.serve.rollout.registry_watcher as f; print(asyncio.run(f._resolve('models:/a@b')))"
        )
        start = shared().popen(["serve", "models:/a@b", "--port", "0"], cwd=tmp_path, env=environment)
        both = [start, shared().popen([], cwd=tmp_path, env=environment, code=follow)]
        started, followed = [(*process.communicate(timeout=120), process.returncode) for process in both]
    message = "the tracking server does not answer at"
    assert message in started[1] and started[2] == 2
    assert message in followed[1] and followed[0] == "None\n"


def test_a_call_with_progress_is_awaited_and_a_stalled_one_times_out():
    going, arrived, stop = threading.Event(), [0], threading.Event()

    def more() -> int:
        arrived[0] += not going.is_set()
        return arrived[0]

    threading.Timer(1, going.set).start()
    assert model_source._attended(lambda: going.wait(20), 0.3, more) is True
    try:
        with pytest.raises(TimeoutError, match=r"no data received for 0\.3 s"):
            model_source._attended(stop.wait, 0.3)
    finally:
        stop.set()
    with pytest.raises(ZeroDivisionError):
        model_source._attended(lambda: 1 // 0, 5)


@pytest.mark.slow
def test_an_unreachable_server_is_reported(tmp_path):
    """Test in another process: MLflow keeps the settings of its first request."""
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code = "import sys, refract.serve.rollout.model_source as s\ntry: s.resolve('models:/a@b')\nexcept s.SourceError as e: print(e)"
        environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        out, err = shared().popen([], cwd=tmp_path, env=environment, code=code).communicate(timeout=60)
    assert f"the tracking server does not answer at {uri}" in out, err
