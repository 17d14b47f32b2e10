"""An engine that starts to fail while it serves."""

import threading
import time

import numpy as np
import pytest

from refract.serve.http.app import create_app
from refract.serve.rollout.canary import Challenge
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.model_worker import FAILURES


class Failing(Engine):
    """how: `raise` or `nan` in each batch and in the self-test; None for no failure."""

    how, for_good = None, True

    def compute(self, batch):
        if self.how and (self.for_good or threading.current_thread().name == "inference"):
            if self.how == "raise":
                raise RuntimeError("the device is gone")
            return np.full((len(batch), 2, 10), np.nan, np.float32)
        return super().compute(batch)


PROBES = ("/readyz", "/v2/health/ready", "/livez", "/v2/health/live")


def probes(client) -> list[int]:
    return [client.get(path).status_code for path in PROBES]


def wait_for(client, wanted: list[int]) -> None:
    end = time.monotonic() + 20
    while (statuses := probes(client)) != wanted:
        assert time.monotonic() < end, statuses
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_an_engine_that_always_fails_is_not_ready_and_then_not_alive(bundle, serving, make_image, how) -> None:
    engine = Failing(bundle)
    with serving(create_app(engine, max_wait_ms=0)) as client:
        assert probes(client) == [200] * 4
        engine.how = how
        for _ in range(FAILURES):
            assert client.post("/v1/predict", content=make_image(1)).status_code == 500
        wait_for(client, [503, 503, 200, 200])
        refused = client.post("/v1/predict", content=make_image(1))
        assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
        wait_for(client, [503] * 4)
        engine.how = None
        wait_for(client, [200] * 4)
        assert client.post("/v1/predict", content=make_image(1)).status_code == 200


def test_an_engine_that_passes_its_self_test_stays_ready(bundle, serving, make_image) -> None:
    """It fails only on some requests."""
    tests: list[int] = []

    class Picky(Failing):
        def self_test(self):
            tests.append(1)
            return super().self_test()

    engine = Picky(bundle)
    engine.for_good = False
    with serving(create_app(engine, max_wait_ms=0)) as client:
        engine.how = "raise"
        for _ in range(FAILURES - 1):
            assert client.post("/v1/predict", content=make_image(1)).status_code == 500
        engine.how = None
        assert client.post("/v1/predict", content=make_image(1)).status_code == 200
        engine.how = "raise"
        for _ in range(FAILURES - 1):
            assert client.post("/v1/predict", content=make_image(1)).status_code == 500
        assert len(tests) == 1, "fewer consecutive failures"
        assert client.post("/v1/predict", content=make_image(1)).status_code == 500
        end = time.monotonic() + 20
        while len(tests) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert probes(client) == [200] * 4


COUNTED = "refract_challenger_images_total"


def test_a_canary_that_returns_nan_gets_no_more_requests(bundle, other, serving, make_image) -> None:
    engine = Failing(other)
    app = create_app(bundle, challenge=Challenge(engine, fraction=1, answers=True))
    with serving(app) as client:
        engine.how = "nan"
        for i in range(FAILURES):
            answer = client.post("/v1/predict", content=make_image(i))
            assert answer.status_code == 200 and answer.json()["model"]["digest"] == bundle.digest
        end = time.monotonic() + 20
        while not app.state.service.models.challenger.worker.unfit:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert probes(client) == [200] * 4
        failed = app.state.service.metrics.registry.get_sample_value(COUNTED, {"end": "failed"})
        for i in range(5):
            assert client.post("/v1/predict", content=make_image(i)).status_code == 200
        assert app.state.service.metrics.registry.get_sample_value(COUNTED, {"end": "failed"}) == failed, (
            "it gets no request"
        )
        engine.how = None
        while client.post("/v1/predict", content=make_image(1)).json()["model"]["digest"] != other.digest:
            assert time.monotonic() < end
            time.sleep(0.05)
