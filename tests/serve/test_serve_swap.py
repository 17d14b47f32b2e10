"""Hot swaps and roll-backs: no request is lost, and each response names the model that predicted."""

import asyncio
import gc
import json
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from refract.models.bundle.bundle import BundleError
from refract.serve.errors import NotReadyError
from refract.serve.http.app import create_app
from refract.serve.http.auth import ApiKeys
from refract.serve.metrics import Metrics
from refract.serve.requests.limits import Limits
from refract.serve.rollout.canary import Challenge
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.service import Service


def row_of(answer) -> np.ndarray:
    by_label = {entry["label"]: entry["confidence"] for entry in answer.json()["predictions"][0]["top"]}
    return np.array([by_label[f"class {i}"] for i in range(10)], dtype=np.float32)


def test_swaps_under_load_lose_no_request_and_mix_no_models(
    bundle, other, serving, make_image, reference, inference_threads
) -> None:
    data = make_image(5)
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
            asyncio.run_coroutine_threadsafe(service.models.swap(engines[k % 2]), loops[0]).result(30)
        stop.set()
        assert sum(future.result() for future in asking) > 30
        assert client.get("/v1/model").json()["digest"] == bundle.digest
    assert not inference_threads(), "the threads of the old model workers have ended"


def test_an_unfit_model_is_rejected_and_the_old_one_still_serves(bundle, make_bundle, served, tmp_path: Path) -> None:
    wrong = make_bundle(tmp_path / "wrong", seed=2, wrong=0.2)
    strange = make_bundle(tmp_path / "strange", word="kind")
    several = make_bundle(tmp_path / "several", task="multilabel", thresholds=[0.5] * 10)

    async def story(service: Service) -> None:
        for bad, message in ((wrong, "golden sample"), (strange, "labels differ"), (several, "labels differ")):
            with pytest.raises(BundleError, match=message):
                await service.models.swap(Engine(bad))
        assert service.models.engine.bundle.digest == bundle.digest and service.models.ready

    served(Engine(bundle), story)


def test_a_swap_during_the_shutdown_has_no_effect(bundle, other, inference_threads) -> None:
    async def main() -> None:
        service = Service(Engine(bundle), limits=Limits(), metrics=Metrics())
        await service.start()
        await service.stop()
        with pytest.raises(NotReadyError):
            await service.models.swap(Engine(other))

    asyncio.run(main())
    assert not inference_threads()


def test_roll_back_needs_a_key(bundle, other, serving, tmp_path: Path) -> None:
    with serving(create_app(bundle)) as client:
        assert client.post("/admin/rollback").status_code == 404, "nobody may without keys"
    (tmp_path / "keys").write_text("open-sesame\n")
    app = create_app(bundle, keys=ApiKeys(tmp_path / "keys"))
    headers = {"Authorization": "Bearer open-sesame"}
    with serving(app) as client:
        assert client.post("/admin/rollback").status_code == 401
        first = client.post("/admin/rollback", headers=headers)
        assert (first.status_code, first.json()["code"]) == (409, "no_model_before")
        app.state.service.models.previous = Engine(other)
        assert client.post("/admin/rollback", headers=headers).json() == {"model": "shapes", "digest": other.digest}
        assert client.get("/v1/model", headers=headers).json()["digest"] == other.digest
        assert app.state.service.models.rolled_back_from == bundle.path and not app.state.service.models.rejected
    (tmp_path / "admins").write_text("root-of-all\n")
    with serving(create_app(bundle, keys=ApiKeys(tmp_path / "keys"), admin=ApiKeys(tmp_path / "admins"))) as client:
        assert client.post("/admin/rollback", headers=headers).status_code == 401, "who may ask may not administer"
        assert client.post("/admin/rollback", headers={"X-API-Key": "root-of-all"}).status_code == 409
        assert client.get("/v1/model", headers={"X-API-Key": "root-of-all"}).status_code == 401


def test_two_concurrent_roll_backs_return_to_the_same_model(bundle, other, served) -> None:
    async def story(service: Service) -> None:
        await service.models.swap(Engine(other))
        await asyncio.gather(service.models.roll_back(), service.models.roll_back())
        assert (
            service.models.engine.bundle.digest == other.digest
            and service.models.previous.bundle.digest == bundle.digest
        )
        await service.models.roll_back()
        assert service.models.engine.bundle.digest == bundle.digest

    served(Engine(bundle), story)


def test_a_version_swapped_while_the_body_arrives_does_not_answer(bundle, other, serving) -> None:
    app = create_app(bundle)
    service = app.state.service
    loops: list[asyncio.AbstractEventLoop] = []
    start = service.start

    async def started() -> None:
        loops.append(asyncio.get_running_loop())
        await start()

    service.start = started
    pixels = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
    body = json.dumps({"inputs": [pixels]}).encode()

    def slowly():
        yield body[:10]
        while not service.admission.in_flight:
            time.sleep(0.01)
        asyncio.run_coroutine_threadsafe(service.models.swap(Engine(other)), loops[0]).result(30)
        yield body[10:]

    with serving(app) as client:
        answer = client.post(f"/v2/models/shapes/versions/{bundle.digest[:16]}/infer", content=slowly())
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")
        assert client.post(f"/v2/models/shapes/versions/{other.digest[:16]}/infer", content=body).status_code == 200


def test_a_swapped_engine_is_freed_at_once(bundle, other, serving, make_image) -> None:
    """Garbage collection is rare in a server, and skips the objects of the start-up."""
    app = create_app(Engine(bundle), challenge=Challenge(Engine(other), fraction=1, answers=False))
    service = app.state.service
    gone: list[weakref.ref[Engine]] = []
    gc.collect()
    gc.disable()
    try:
        with serving(app) as client:
            loop = service.models.champion._loop
            for take in (service.models.swap, service.models.swap, service.models.swap):
                gone.append(weakref.ref(service.models.engine))
                assert client.post("/v1/predict?explain=true", content=make_image(1)).status_code == 200
                asyncio.run_coroutine_threadsafe(take(Engine(other)), loop).result(30)
            gone.append(weakref.ref(service.models.challenger.worker.engine))
            challenge = Challenge(Engine(bundle), fraction=1, answers=True)
            asyncio.run_coroutine_threadsafe(service.models.challenge(challenge), loop).result(30)
            client.post("/v1/predict", content=make_image(1))
            deadline = time.monotonic() + 10
            while service.models._retiring and time.monotonic() < deadline:
                time.sleep(0.01)
            assert [one() is None for one in gone] == [True, True, False, True], "all but the one before, and the new"
    finally:
        gc.enable()
