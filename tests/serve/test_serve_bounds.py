"""A busy server: one batch of the waiting requests, 429 responses, deadlines, and cancelled requests."""

import asyncio
import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.requests import Request

from refract.augment.preprocess import Preprocess
from refract.serve.errors import RequestError
from refract.serve.http.app import create_app
from refract.serve.requests.body import unless_gone
from refract.serve.requests.decoding import decode, is_quick, read
from refract.serve.requests.limits import Budget, Limits, OverloadedError
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.model_worker import ModelWorker


class GatedEngine(Engine):
    """Records the size of each batch. While its gate is closed, it waits before it computes."""

    def __init__(self, bundle):
        super().__init__(bundle)
        self.sizes, self.entered, self.gate = [], threading.Event(), threading.Event()
        self.gate.set()

    def compute(self, batch):
        self.entered.set()
        self.gate.wait(30)
        self.sizes.append(len(batch))
        return super().compute(batch)


@contextlib.contextmanager
def busy(engine: GatedEngine, client: httpx.Client, **request) -> Iterator[Future[httpx.Response]]:
    """Send a request and wait until it is at the engine, which computes it when `gate` is set."""
    engine.sizes.clear()
    engine.entered.clear()
    engine.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/predict", **request)
        try:
            assert engine.entered.wait(10)
            yield first
        finally:
            engine.gate.set()


def prepare(kind: str, body: bytes, preprocess: Preprocess, budget: Budget) -> np.ndarray:
    return decode(read(kind, body, budget.limits), preprocess, budget)


def test_the_pixels_decoded_at_a_time_are_limited(bundle, make_image) -> None:
    """While an image of 40 × 56 is being decoded, another one of that size exceeds the budget, but a small one does not."""
    limits = Limits(max_pixels=3_000, max_decoding_pixels=3_000)
    budget, plain = Budget(limits), Engine(bundle).preprocess
    inside, resume = threading.Event(), threading.Event()

    class Slow(Preprocess):
        def __call__(self, image, **options):
            inside.set()
            assert resume.wait(20)
            return super().__call__(image, **options)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(prepare, "", make_image(0), Slow(32, 32), budget)
        assert inside.wait(20)
        with pytest.raises(OverloadedError, match="2,240 pixels are being decoded already"):
            prepare("", make_image(1), plain, budget)
        assert prepare("", make_image(1, size=(20, 20)), plain, budget).shape == (1, 32, 32, 3)
        resume.set()
        assert first.result().shape == (1, 32, 32, 3)
    assert prepare("", make_image(1), plain, budget).shape == (1, 32, 32, 3), "the pixels are released"
    with pytest.raises(RequestError, match="the limit is 3,000"):
        prepare("", make_image(1, size=(80, 80)), plain, budget)
    with pytest.raises(ValueError, match="it must be at least max_pixels"):
        Limits(max_pixels=10, max_decoding_pixels=9)


def test_only_small_baseline_jpegs_are_decoded_on_the_event_loop(make_image) -> None:
    small = make_image(1)
    assert is_quick("image/jpeg", small) and is_quick("", small)
    assert not is_quick("multipart/form-data; boundary=b", small) and not is_quick("application/json", small)
    assert not is_quick("image/jpeg", make_image(1, size=(200, 200))) and not is_quick(
        "image/png", make_image(1, form="PNG")
    )
    assert not is_quick("image/jpeg", small + bytes(20_000)) and not is_quick("image/jpeg", small[:20])
    progressive = io.BytesIO()
    Image.open(io.BytesIO(small)).save(progressive, "JPEG", progressive=True)
    assert not is_quick("image/jpeg", progressive.getvalue())


def test_incomplete_bodies_do_not_block_an_idle_engine(bundle, serving, make_image):
    with serving(create_app(SlowEngine(bundle), deadline_s=2)) as client:
        head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n"
        address = (client.base_url.host, client.base_url.port)
        with contextlib.ExitStack() as slow:
            for _ in range(30):
                slow.enter_context(socket.create_connection(address)).sendall(head)
            wait_until(lambda: client.get("/v1/status").json()["requests"] == 30)
            assert client.post("/v1/predict", content=make_image(1)).status_code == 200


class SlowEngine(Engine):
    """Takes a tenth of a second for each image."""

    def compute(self, batch):
        time.sleep(0.1 * len(batch))
        return super().compute(batch)


def test_a_request_that_would_miss_its_deadline_is_rejected_immediately(bundle, serving, make_image):
    with serving(create_app(SlowEngine(bundle), deadline_s=2)) as client, ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda i: client.post("/v1/predict", content=make_image(i)), range(40)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 5
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert "the response would take about" in refused.json()["detail"] and int(refused.headers["retry-after"]) >= 1
        assert client.post("/v1/predict", content=make_image(1)).status_code == 200


def test_a_rejected_client_receives_retry_after(bundle, serving, make_image, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(create_app(bundle, deadline_s=10)) as client:
        monkeypatch.setattr(ModelWorker, "expected", lambda self, images=0: 7.4)
        answer = client.post("/v1/predict", content=make_image(1))
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.01)


def test_requests_that_arrive_while_the_engine_computes_form_one_batch(bundle, serving, make_image):
    engine = GatedEngine(bundle)
    app = create_app(engine, max_wait_ms=60_000)  # not reached: no other request is in preparation
    with serving(app) as client, ThreadPoolExecutor(2) as pool, busy(engine, client, content=make_image(0)) as first:
        rest = [pool.submit(client.post, "/v1/predict", content=make_image(i)) for i in (1, 2)]
        wait_until(lambda: app.state.service.models.champion.waiting == 2)
        engine.gate.set()
        assert [answer.result().status_code for answer in (first, *rest)] == [200] * 3
    assert engine.sizes == [1, 2]


def test_a_full_queue_answers_429_and_recovers(bundle, serving, make_image):
    engine = GatedEngine(bundle)
    files = [("f", ("x.jpg", make_image(i))) for i in range(3)]
    app = create_app(engine, limits=Limits(max_images=3), max_batch=1, max_wait_ms=0, max_queue=6)
    with serving(app) as client, busy(engine, client, files=files) as first:
        # One image is at the engine, two are in the queue of six.
        refused = client.post("/v1/predict?tta=flip", files=files)
        alive = client.get("/livez")
        engine.gate.set()
        assert first.result().status_code == 200
        assert client.post("/v1/predict?tta=flip", files=files).status_code == 200
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["code"] == "overloaded"
    assert alive.status_code == 200


def test_the_limit_of_requests_in_flight_answers_429_before_the_body_is_read(bundle, serving, make_image):
    engine = GatedEngine(bundle)
    app = create_app(engine, max_requests=1)
    with serving(app) as client, busy(engine, client, content=make_image(0)) as first:
        refused = client.post("/v1/predict", content=b"not even an image")
        engine.gate.set()
        assert first.result().status_code == 200
        assert client.post("/v1/predict", content=make_image(0)).status_code == 200
    assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")


def test_a_request_past_its_deadline_is_not_computed(bundle, serving, make_image):
    engine = GatedEngine(bundle)
    app = create_app(engine, deadline_s=1, max_batch=1)
    with serving(app) as client, busy(engine, client, content=make_image(0)) as first:
        for late in (client.post("/v1/predict", content=make_image(1)), first.result()):
            assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        engine.gate.set()
        assert client.post("/v1/predict", content=make_image(2)).status_code == 200
    assert engine.sizes == [1, 1], "the first request was at the engine already, the second one was cancelled before"


def test_a_request_of_a_disconnected_client_is_not_computed(bundle, serving, make_image):
    engine = GatedEngine(bundle)
    app = create_app(engine, max_batch=1)
    with serving(app) as client, busy(engine, client, content=make_image(0)) as first:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/predict", content=make_image(1), timeout=0.5)
        wait_until(lambda: app.state.service.admission.in_flight == 1)
        engine.gate.set()
        assert first.result().status_code == 200
        assert client.post("/v1/predict", content=make_image(2)).status_code == 200
    assert engine.sizes == [1, 1]


def test_a_request_cancelled_by_the_server_stays_cancelled_if_its_client_disconnects() -> None:
    """Otherwise a server that shuts down would wait for the requests that it cancelled."""

    async def main(also: bool) -> BaseException:
        async def receive() -> dict[str, str]:
            if also:
                task.cancel()
            return {"type": "http.disconnect"}

        task = asyncio.create_task(unless_gone(Request({"type": "http"}, receive), asyncio.sleep(30)))
        with pytest.raises((asyncio.CancelledError, RequestError)) as end:
            await task
        return end.value

    assert isinstance(asyncio.run(main(also=True)), asyncio.CancelledError)
    left = asyncio.run(main(also=False))
    assert isinstance(left, RequestError) and left.code == "client_disconnected"


def test_pipelined_requests_of_a_disconnected_client_are_not_computed(bundle, serving, make_image, caplog):
    engine = GatedEngine(bundle)
    app = create_app(engine, max_batch=1)
    data = make_image(1)
    request = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    with serving(app) as client, busy(engine, client, content=make_image(0)) as first:
        for _ in range(5):
            with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
                connection.sendall(request * 3)
                wait_until(lambda: app.state.service.admission.in_flight == 2)
            wait_until(lambda: app.state.service.admission.in_flight == 1)
        engine.gate.set()
        assert first.result().status_code == 200
        assert client.post("/v1/predict", content=make_image(2)).status_code == 200
    assert engine.sizes == [1, 1] and "Exception in ASGI" not in caplog.text


def test_bodies_are_released(bundle, serving, make_image):
    pixels = {"name": "images", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": [7] * 192}
    with serving(create_app(bundle, limits=Limits(max_held_bytes=4_000))) as client:
        for _ in range(8):
            assert client.post("/v1/predict", content=make_image(1)).status_code == 200
            assert client.post("/v1/predict", content=b"x" * 2_000).status_code == 400
            assert client.post("/v2/models/shapes/infer", json={"inputs": [pixels]}).status_code == 200


def test_the_bodies_of_all_routes_share_one_limit(bundle, serving):
    with serving(create_app(bundle, limits=Limits(max_held_bytes=100_000))) as client:
        address = (client.base_url.host, client.base_url.port)
        head = b"POST /v2/models/shapes/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n"
        with socket.create_connection(address) as half:
            half.sendall(head + bytes(80_000))
            wait_until(lambda: client.post("/v1/predict", content=bytes(50_000)).status_code == 429)
        wait_until(lambda: client.post("/v1/predict", content=bytes(50_000)).status_code == 400)


class Tiring(SlowEngine):
    """Is fast in its self-test, and slow from the first request on."""

    tired = False

    def compute(self, batch):
        return super().compute(batch) if self.tired else Engine.compute(self, batch)


@pytest.mark.slow
def test_the_pace_is_measured_on_requests(bundle, serving, make_image):
    engine = Tiring(bundle)
    with serving(create_app(engine, deadline_s=2)) as client, ThreadPoolExecutor(40) as pool:
        engine.tired = True
        for _ in range(10):
            assert client.post("/v1/predict", content=make_image(0)).status_code == 200
        answers = list(pool.map(lambda i: client.post("/v1/predict", content=make_image(i)).status_code, range(60)))
        assert set(answers) == {200, 429}


def test_a_bitmap_with_the_bytes_of_a_jpeg_header_is_not_decoded_on_the_event_loop() -> None:
    assert not is_quick("image/bmp", b"BM\xff\xc0\x00\x11\x08\x00\x01\x00" + bytes(200))


def test_too_many_heat_maps_are_rejected(bundle, serving, make_image):
    with serving(create_app(bundle)) as client:
        files = [("f", ("x.jpg", make_image(1)))] * 9
        refused = client.post("/v1/predict?explain=true", files=files)
        assert (refused.status_code, refused.json()["code"]) == (413, "too_many_images")
        assert client.post("/v1/predict?explain=true", files=files[:8]).status_code == 200
