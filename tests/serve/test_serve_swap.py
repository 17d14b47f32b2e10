"""Another model, with no request lost and none answered in another's name."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from models.bundle import Bundle, BundleError, load_bundle
from serve.app import create_app
from serve.command import RefusedError, _bundle
from serve.engine import Engine
from serve.errors import NotReadyError
from serve.follow import Follower
from serve.keys import Keys
from serve.limits import Limits
from serve.metrics import Metrics
from serve.service import Service
from serve.source import resolve


@pytest.fixture(scope="module")
def other(make_bundle, tmp_path_factory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("other") / "shapes", seed=1)


def row_of(answer) -> np.ndarray:
    by_label = {entry["label"]: entry["confidence"] for entry in answer.json()["predictions"][0]["top"]}
    return np.array([by_label[f"class {i}"] for i in range(10)], dtype=np.float32)


def test_swaps_under_load_lose_nothing_and_mix_nothing(bundle, other, serving, picture, reference) -> None:
    data = picture(5)
    wanted = {b.digest: reference(b.classifier("cpu"), data, "multiclass") for b in (bundle, other)}
    app, stop = create_app(bundle), threading.Event()
    service = app.state.service
    loops: list[asyncio.AbstractEventLoop] = []
    start = service.start

    async def started() -> None:
        loops.append(asyncio.get_running_loop())
        await start()

    service.start = started
    with serving(app) as client, ThreadPoolExecutor(4) as pool:

        def ask(_: int) -> int:
            count = 0
            while not stop.is_set():
                answer = client.post("/v1/predict?top=10", content=data)
                assert answer.status_code == 200, answer.text
                digest = answer.json()["model"]["digest"]
                assert answer.headers["x-model-digest"] == digest[:16]
                np.testing.assert_allclose(row_of(answer), wanted[digest], atol=1e-5)
                count += 1
            return count

        asking = [pool.submit(ask, i) for i in range(4)]
        engines = [Engine(other), Engine(bundle)]
        for k in range(30):
            asyncio.run_coroutine_threadsafe(service.swap(engines[k % 2]), loops[0]).result(30)
        stop.set()
        assert sum(future.result() for future in asking) > 30
        assert client.get("/v1/model").json()["digest"] == bundle.digest
    assert not any(thread.name == "inference" for thread in threading.enumerate()), "the old lanes' threads have ended"


def served(engine: Engine, story) -> None:
    async def main() -> None:
        service = Service(engine, limits=Limits(), metrics=Metrics())
        await service.start()
        try:
            await story(service)
        finally:
            await service.stop()

    asyncio.run(main())


def test_what_cannot_answer_is_refused_and_the_old_one_goes_on(bundle, make_bundle, tmp_path: Path) -> None:
    wrong = make_bundle(tmp_path / "wrong", seed=2, wrong=0.2)
    strange = make_bundle(tmp_path / "strange", word="kind")
    several = make_bundle(tmp_path / "several", task="multilabel", thresholds=[0.5] * 10)

    async def story(service: Service) -> None:
        for bad, message in ((wrong, "golden picture"), (strange, "other labels"), (several, "other labels")):
            with pytest.raises(BundleError, match=message):
                await service.swap(Engine(bad))
        assert service.engine.bundle.digest == bundle.digest and service.ready

    served(Engine(bundle), story)


def test_a_swap_while_it_goes_down_is_none(bundle, other) -> None:
    async def main() -> None:
        service = Service(Engine(bundle), limits=Limits(), metrics=Metrics())
        await service.start()
        await service.stop()
        with pytest.raises(NotReadyError):
            await service.swap(Engine(other))

    asyncio.run(main())
    assert not any(thread.name == "inference" for thread in threading.enumerate())


def test_a_person_goes_back_with_a_key(bundle, other, serving, tmp_path: Path) -> None:
    with serving(create_app(bundle)) as client:
        assert client.post("/admin/rollback").status_code == 404, "nobody may without keys"
    (tmp_path / "keys").write_text("k\n")
    app = create_app(bundle, keys=Keys(tmp_path / "keys"))
    own = {"Authorization": "Bearer k"}
    with serving(app) as client:
        assert client.post("/admin/rollback").status_code == 401
        first = client.post("/admin/rollback", headers=own)
        assert (first.status_code, first.json()["code"]) == (409, "no_model_before")
        app.state.service._previous = Engine(other)
        assert client.post("/admin/rollback", headers=own).json() == {"model": "shapes", "digest": other.digest}
        assert client.get("/v1/model", headers=own).json()["digest"] == other.digest
        assert app.state.service.rejected == {bundle.path}


@pytest.fixture
def registry(bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """(a function that makes a bundle the champion of a real registry, the folder of the registry)"""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("HOME", str(tmp_path))
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("shapes", artifact_location=(tmp_path / "artifacts").as_uri())
    client.create_registered_model("shapes")

    def promote(made: Bundle) -> None:
        run = client.create_run(experiment)
        client.log_artifacts(run.info.run_id, str(made.path), "bundle")
        version = client.create_model_version("shapes", f"{run.info.artifact_uri}/bundle", run.info.run_id)
        client.set_registered_model_alias("shapes", "champion", version.version)

    promote(bundle)
    return promote, tmp_path


@pytest.mark.slow
def test_a_new_champion_answers_a_bad_one_does_not_and_a_person_is_obeyed(
    registry, bundle, other, make_bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    promote, _ = registry
    name = "models:/shapes@champion"

    async def story(service: Service) -> None:
        follower = Follower(service, name, build=Engine, every_s=60)
        assert not await follower.look(), "it means the same"
        promote(other)
        assert await follower.look() and service.engine.bundle.digest == other.digest
        promote(make_bundle(tmp_path / "wrong", seed=3, wrong=0.2))
        assert not await follower.look() and service.engine.bundle.digest == other.digest
        assert "goes on: " in caplog.text and "golden picture" in caplog.text
        assert not await follower.look() and caplog.text.count("golden picture") == 1, "it is not tried again"
        promote(other)
        assert await follower.look()
        await service.roll_back()
        assert not await follower.look(), "a person went back from it"

    served(Engine(load_bundle(resolve(name))), story)


def test_a_damaged_download_is_fetched_again_and_a_folder_of_ones_own_is_left_alone(
    registry, bundle, make_bundle, tmp_path: Path
) -> None:
    name = "models:/shapes@champion"
    path = resolve(name)
    (path / "weights.safetensors").write_bytes(b"damaged")
    assert _bundle(name).digest == bundle.digest, "another one has come in its place"
    own = make_bundle(tmp_path / "own").path
    (own / "weights.safetensors").write_bytes(b"damaged")
    before = sorted(own.rglob("*"))
    for said in (str(own), f"{own}/", f"{own.parent}/./own"):
        with pytest.raises(RefusedError, match=r"weights\.safetensors"):
            _bundle(said)
    assert sorted(own.rglob("*")) == before


def test_a_cache_that_cannot_be_written_serves_what_it_has(registry, bundle, tmp_path: Path, caplog) -> None:
    name = "models:/shapes@champion"
    path = resolve(name)
    (last,) = path.parent.glob("last-*")
    last.unlink()
    last.mkdir()  # root may write anywhere, but not a file where a folder is
    assert resolve(name) == path and "cannot be written" in caplog.text


@pytest.mark.slow
def test_with_the_server_down_it_starts_with_what_the_name_meant_last(registry, bundle, tmp_path: Path) -> None:
    """A real tracking server, which is then killed; a damaged download is not lost to that."""
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
    ]
    environ = {**os.environ, "MLFLOW_TRACKING_URI": address}
    name = "models:/shapes@champion"

    def located() -> dict[str, str]:
        done = subprocess.run([sys.executable, "-m", "serve.source", name], capture_output=True, text=True, env=environ)
        return json.loads(done.stdout)

    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            for _ in range(200):
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{address}/health", trust_env=False).status_code == 200:
                        break
                time.sleep(0.2)
            path = Path(located()["path"])
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    assert located() == {"path": str(path)} and load_bundle(path).digest == bundle.digest
    (path / "weights.safetensors").write_bytes(b"damaged")
    serve = [sys.executable, "-m", "serve.command", name, "--port", "0"]
    done = subprocess.run(serve, capture_output=True, text=True, env=environ)
    assert done.returncode == 2 and "the tracking server does not answer" in done.stderr
    assert path.is_dir() and not list(path.parent.glob(".damaged-*")), "nothing is lost, nothing left over"
    shutil.rmtree(path)
    assert "the tracking server does not answer" in located()["error"]
