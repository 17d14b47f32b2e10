"""A name in a real MLflow registry: its version is downloaded, cached, self-tested and served."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
from warm_process import Started, shared

from refract.models.bundle.bundle import Bundle, load_bundle
from refract.serve.cli.command import InvalidOptionError, _bundle
from refract.serve.rollout.canary import Challenge
from refract.serve.rollout.model_source import resolve
from refract.serve.rollout.registry_watcher import registry_watchers
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.service import Service

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow  # together they take minutes: `make test-fast` has two


@pytest.fixture
def registry(bundle, tmp_path: Path, new_tracking: Path, monkeypatch: pytest.MonkeyPatch):
    """(a function that registers a bundle as the champion of a real registry, the folder of the registry)"""
    shutil.copy(new_tracking, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("HOME", str(tmp_path))
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("shapes", artifact_location=(tmp_path / "artifacts").as_uri())
    client.create_registered_model("shapes")

    def promote(candidate: Bundle, alias: str = "champion") -> None:
        run = client.create_run(experiment)
        client.log_artifacts(run.info.run_id, str(candidate.path), "bundle")
        version = client.create_model_version("shapes", f"{run.info.artifact_uri}/bundle", run.info.run_id)
        client.set_registered_model_alias("shapes", alias, version.version)

    promote(bundle)
    return promote, tmp_path


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look up names in this process: a subprocess takes three seconds to import MLflow."""

    async def located(source: str, damaged: Path | None = None) -> Path:
        assert damaged is None
        return await asyncio.to_thread(resolve, source)

    monkeypatch.setattr("refract.serve.rollout.registry_watcher._resolve", located)


@pytest.mark.usefixtures("in_this_process")
def test_a_new_champion_is_served_a_bad_one_is_rejected_and_a_rollback_is_respected(
    registry, bundle, other, make_bundle, served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    promote, _ = registry
    name = "models:/shapes@champion"

    async def story(service: Service) -> None:
        (follower,) = registry_watchers(service, name, None, build=Engine, every_s=60)
        assert not await follower.look(), "the name refers to the same version"
        promote(other)
        assert await follower.look() and service.models.engine.bundle.digest == other.digest
        promote(make_bundle(tmp_path / "wrong", seed=3, wrong=0.2))
        assert not await follower.look() and service.models.engine.bundle.digest == other.digest
        assert "stays in service: " in caplog.text and "golden sample" in caplog.text
        assert not await follower.look() and caplog.text.count("golden sample") == 1, "it is not tried again"
        promote(other)
        assert await follower.look()
        await service.models.roll_back()
        os.utime(service.models.engine.bundle.path, (0, 0))
        for _ in range(2):
            assert not await follower.look(), "this version was rolled back"
        assert caplog.text.count("which was rolled back") == 1
        assert service.models.engine.bundle.path.stat().st_mtime > 0, (
            "the served version counts as used, and stays in the cache"
        )

    served(Engine(load_bundle(resolve(name))), story)


def test_a_damaged_download_is_replaced_and_a_local_folder_is_unchanged(
    registry, bundle, make_bundle, tmp_path: Path
) -> None:
    name = "models:/shapes@champion"
    path = resolve(name)
    (path / "weights.safetensors").write_bytes(b"damaged")
    assert _bundle(name).digest == bundle.digest, "a new download has replaced it"
    folder = make_bundle(tmp_path / "own").path
    (folder / "weights.safetensors").write_bytes(b"damaged")
    before = sorted(folder.rglob("*"))
    for said in (str(folder), f"{folder}/", f"{folder.parent}/./own"):
        with pytest.raises(InvalidOptionError, match=r"weights\.safetensors"):
            _bundle(said)
    assert sorted(folder.rglob("*")) == before


def test_a_download_damaged_before_the_swap_is_replaced(registry, bundle, other, served) -> None:
    promote, _ = registry
    promote(other)
    damaged = resolve("models:/shapes/2")
    (damaged / "weights.safetensors").write_bytes(b"damaged")

    async def story(service: Service) -> None:
        (follower,) = registry_watchers(service, "models:/shapes@champion", None, build=Engine, every_s=60)
        assert await follower.look() and service.models.engine.bundle.digest == other.digest
        assert not service.models.rejected

    served(Engine(load_bundle(resolve("models:/shapes/1"))), story)


def start_resolving(*arguments: str, env: Mapping[str, str] | None = None) -> Started:
    """Start the process in which a server resolves a registered name. Its output is JSON."""
    code = "import runpy; runpy.run_module('refract.serve.rollout.model_source', run_name='__main__')"
    return shared().popen(arguments, cwd=ROOT, env=env, code=code)


def test_two_servers_that_replace_one_damaged_download_both_succeed(registry, bundle) -> None:
    name = "models:/shapes@champion"
    path = resolve(name)
    (path / "weights.safetensors").write_bytes(b"damaged")
    both = [start_resolving(name, str(path)) for _ in range(2)]
    results = [json.loads(process.communicate(timeout=100)[0]) for process in both]
    assert results == [{"path": str(path)}] * 2 and load_bundle(path).digest == bundle.digest
    assert sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("last-")) == [path.name]


def test_a_read_only_cache_serves_its_versions(registry, bundle, tmp_path: Path, caplog) -> None:
    name = "models:/shapes@champion"
    path = resolve(name)
    (last,) = path.parent.glob("last-*")
    last.unlink()
    last.mkdir()  # a folder blocks the file, as root may write anywhere
    assert resolve(name) == path and "is not writable" in caplog.text


@pytest.mark.usefixtures("in_this_process")
def test_the_name_of_a_challenger_is_watched_too(registry, bundle, other, served) -> None:
    promote, _ = registry
    promote(other, "challenger")
    challenge = Challenge(None, fraction=1, answers=True, follow="models:/shapes@challenger")

    async def story(service: Service) -> None:
        (follower,) = registry_watchers(service, None, challenge, build=Engine, every_s=60)
        assert await follower.look() and not await follower.look()
        assert service.models.challenger.worker.engine.bundle.digest == other.digest
        assert service.models.engine.bundle.digest == bundle.digest
        promote(bundle, "challenger")
        assert await follower.look() and service.models.challenger.worker.engine.bundle.digest == bundle.digest

    served(Engine(bundle), story)


@pytest.mark.usefixtures("in_this_process")
def test_a_rolled_back_version_is_served_again_after_the_name_referred_to_another(
    registry, bundle, other, served, caplog
) -> None:
    from mlflow import MlflowClient

    promote, folder = registry
    promote(other)
    name, client = "models:/shapes@champion", MlflowClient(f"sqlite:///{folder}/mlflow.db")
    challenge = Challenge(None, fraction=1, answers=False, follow="models:/shapes@challenger")

    def means(version: int, alias: str = "champion") -> None:
        client.set_registered_model_alias("shapes", alias, str(version))

    async def story(service: Service) -> None:
        follower, challenging = registry_watchers(service, name, challenge, build=Engine, every_s=60)
        assert await follower.look() and service.models.engine.bundle.digest == other.digest
        await service.models.roll_back()
        assert not await follower.look() and "which was rolled back" in caplog.text
        means(2, "challenger")
        assert await challenging.look(), "it was rolled back as the champion, but may be the challenger"
        assert not await follower.look() and service.models.engine.bundle.digest == bundle.digest
        means(1)
        assert not await follower.look(), "it is served"
        means(2)
        assert await follower.look() and service.models.engine.bundle.digest == other.digest
        await service.models.roll_back()
        await service.models.roll_back()
        assert service.models.engine.bundle.digest == other.digest and not await follower.look(), (
            "the version that the name refers to"
        )
        means(1)
        assert await follower.look() and service.models.engine.bundle.digest == bundle.digest, (
            "the name refers to it again"
        )

    served(Engine(load_bundle(resolve("models:/shapes/1"))), story)


def test_without_the_tracking_server_the_last_known_version_is_used(registry, bundle, tmp_path: Path) -> None:
    """A real tracking server is killed. A damaged download stays in its place then."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        "--port",
        str(port),
        "--workers=1",
    ]
    environ = {**os.environ, "MLFLOW_TRACKING_URI": address, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    name = "models:/shapes@champion"

    def located() -> dict[str, str]:
        return json.loads(start_resolving(name, env=environ).communicate(timeout=100)[0])

    def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{address}/health", trust_env=False).status_code == 200
        return False

    log = tmp_path / "mlflow.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environ) as server,
    ):
        try:
            deadline = time.monotonic() + 180
            while not answers():
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            answer = located()
            assert "path" in answer, (answer, log.read_text())
            path = Path(answer["path"])
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    assert located() == {"path": str(path)} and load_bundle(path).digest == bundle.digest
    (path / "weights.safetensors").write_bytes(b"damaged")
    serve = shared().popen(["serve", name, "--port", "0"], cwd=ROOT, env=environ)
    _, err = serve.communicate(timeout=200)
    assert serve.returncode == 2 and "the tracking server does not answer" in err
    assert path.is_dir() and not list(path.parent.glob(".damaged-*")), (
        "the download stays, and no temporary files remain"
    )
    shutil.rmtree(path)
    assert "the tracking server does not answer" in located()["error"]
