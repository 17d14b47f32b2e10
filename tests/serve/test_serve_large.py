"""Valid but expensive requests: large images, heat maps, and JSON of many values."""

import asyncio
import io
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from refract.augment.decoding.decode import image_size
from refract.models.occlusion import Occlusion
from refract.serve.http.app import create_app
from refract.serve.requests import infer_parsing
from refract.serve.requests.limits import OverloadedError
from refract.serve.requests.parsing import SPARE, parsed
from refract.serve.requests.protocols import PredictBody
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.pools import PricedPool
from refract.serve.runtime.predictor import READERS
from refract.serve.runtime.service import Service
from refract.serve.runtime.work import Work


def test_a_pool_estimates_its_waiting_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("refract.serve.runtime.pools.time", SimpleNamespace(monotonic=lambda: now[0]))

    def takes(seconds: float) -> None:
        now[0] += seconds

    async def main() -> None:
        threads = PricedPool(2, "test", pace=0.5)
        assert threads.expected(100) == 0, "what can begin at once is not refused"
        with threads.reserved(4), threads.reserved(0.3):
            assert threads.expected(0) == pytest.approx(4.3 * 0.5 / 2)
            assert threads.expected(2) == pytest.approx(6.3 * 0.5 / 2)
        assert threads.expected(2) == 0
        await threads.run(50, lambda: takes(0.5))
        with threads.reserved(100):
            assert threads.expected(0) == pytest.approx(100 * 0.01 / 2, rel=1e-3), (
                "a hundredth of a second each, by two"
            )
            before = threads.expected(0)
            await threads.run(0.01, lambda: takes(0.005))
            assert before < threads.expected(0) < 1.2 * before, (
                "a short task changes the estimate little, at fifty times the pace"
            )
            before = threads.expected(0)
            with pytest.raises(ZeroDivisionError):
                await threads.run(50, lambda: takes(1000) or 1 // 0)
            assert threads.expected(0) == before, "a failed task does not change the estimate"
        threads.close()

    asyncio.run(main())


@pytest.fixture(scope="module")
def flat() -> bytes:
    """49 megapixels in 150 KB."""
    buffer = io.BytesIO()
    Image.new("RGB", (7000, 7000), (3, 4, 5)).save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()


@pytest.mark.slow
def test_large_images_are_rejected_early_and_do_not_delay_ordinary_ones(bundle, serving, make_image, flat) -> None:
    photo = make_image(1, size=(640, 480))
    with serving(create_app(bundle, deadline_s=100)) as client:
        began = time.monotonic()
        assert client.post("/v1/predict", content=flat, headers={"content-type": "image/png"}).status_code == 200
    deadline = max(4, 10 * (time.monotonic() - began))  # time for a quarter of the forty images, on any machine
    with serving(create_app(bundle, deadline_s=deadline)) as client, ThreadPoolExecutor(44) as pool:
        assert client.post("/v1/predict", content=flat, headers={"content-type": "image/png"}).status_code == 200
        large = [
            pool.submit(client.post, "/v1/predict", content=flat, headers={"content-type": "image/png"})
            for _ in range(40)
        ]
        time.sleep(0.3)  # the requests are in flight
        photos = []
        for _ in range(5):
            began = time.monotonic()
            photos.append((client.post("/v1/predict", content=photo).status_code, time.monotonic() - began))
        answers = [future.result() for future in large]
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 429}, counts
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1 and refused.json()["code"] == "overloaded"
    assert {status for status, _ in photos} == {200} and max(seconds for _, seconds in photos) < deadline / 2, photos


def test_large_requests_leave_threads_for_other_requests(bundle, served, make_image, flat) -> None:
    """As many large images as cores wait in the decoder; a small one is still answered."""
    engine, resume = Engine(bundle), threading.Event()

    def held(data: bytes, *, max_pixels: int) -> np.ndarray:
        assert data != flat or resume.wait(20)
        return np.zeros((32, 32, 3), np.uint8)

    async def story(service: Service) -> None:
        engine.preprocess = held
        large = [asyncio.create_task(service.predict(Work(PredictBody(flat, "image/png")))) for _ in range(64)]
        await asyncio.sleep(0)
        small = await asyncio.wait_for(service.predict(Work(PredictBody(make_image(1), "image/jpeg"))), 5)
        assert small.probabilities.shape == (1, 10)
        resume.set()
        ends = await asyncio.gather(*large, return_exceptions=True)
        assert {type(end) for end in ends} <= {type(small), OverloadedError}

    served(engine, story)


@pytest.mark.slow
def test_heat_maps_beyond_the_deadline_are_rejected_before_decoding(bundle, serving, make_image, monkeypatch) -> None:
    steps = Occlusion.steps

    def slow(*given):
        for step in steps(*given):
            time.sleep(0.03)
            yield step

    monkeypatch.setattr(Occlusion, "steps", slow)
    with serving(create_app(bundle, deadline_s=5)) as client, ThreadPoolExecutor(30) as pool:
        assert client.post("/v1/predict?explain=true", content=make_image(1)).status_code == 200
        for _ in range(4):
            client.post("/v1/predict?explain=true", files=[("f", ("x.jpg", make_image(1)))] * 2)
        answers = list(pool.map(lambda i: client.post("/v1/predict?explain=true", content=make_image(i)), range(30)))
        assert {answer.status_code for answer in answers} == {200, 429}
        assert client.post("/v1/predict", content=make_image(1)).status_code == 200


def test_bodies_are_parsed_on_threads_and_few_at_a_time(bundle, served, make_image, monkeypatch) -> None:
    inside, most, names, alone = [0], [0], set(), threading.Lock()

    def slow(data: bytes) -> tuple[int, int]:
        with alone:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            names.add(threading.current_thread().name.partition("_")[0])
        time.sleep(0.01)
        with alone:
            inside[0] -= 1
        return image_size(data)

    async def story(service: Service) -> None:
        monkeypatch.setattr("refract.serve.requests.decoding.image_size", slow)
        await asyncio.gather(*(service.predict(Work(PredictBody(make_image(1), ""))) for _ in range(12)))
        assert most == [READERS] and names == {"read"}

    served(Engine(bundle), story)


def test_v2_documents_are_parsed_on_the_same_threads(bundle, serving, monkeypatch) -> None:
    names = []

    def noted(*given, **options):
        names.append(threading.current_thread().name.partition("_")[0])
        return parsed(*given, **options)

    monkeypatch.setattr(infer_parsing, "parsed", noted)
    pixels = {"name": "images", "datatype": "UINT8", "shape": [1, 100, 100, 3], "data": [255] * 30_000}
    with serving(create_app(bundle)) as client:
        assert client.post("/v2/models/shapes/infer", json={"inputs": [pixels]}).status_code == 200
    assert names == ["read"]


def bomb(part: str, size: int = 8_000_000) -> bytes:
    return ('{"x":[' + ",".join([part] * (size // (len(part) + 1))) + "]}").encode()


@pytest.mark.parametrize("path", ["/v1/predict", "/v2/models/shapes/infer"])
def test_documents_of_many_values_are_rejected_before_parsing(bundle, serving, path: str) -> None:
    with serving(create_app(bundle)) as client:
        refused = client.post(path, content=bomb("{}"), headers={"content-type": "application/json"})
    assert (refused.status_code, refused.json()["code"]) == (413, "json_too_large")
    assert "at most 1,024 objects" in refused.json()["detail"]


@pytest.mark.parametrize("part", ["[]", "1", '""'])
def test_lists_and_values_are_counted(part: str) -> None:
    text = json.dumps({"images": ["," * 3] * 4}).encode()
    assert parsed(text, objects=1, values=3)["images"]
    with pytest.raises(Exception, match="too many values"):
        parsed(text, objects=1, values=2)
    with pytest.raises(Exception, match="too many values"):
        parsed(bomb(part, 50_000), objects=1, values=SPARE)


def test_the_contents_of_a_string_are_not_counted() -> None:
    code = 'if (a[i] == "{") { f(a, b, c); } \\\\ \\" ' * 500
    assert parsed(json.dumps({"text": code}).encode(), objects=1, values=1) == {"text": code}
    for text in ('{"a": "\\\\", "b": [{}, {}]}', '{"a": "\\"", "b": [{}, {}]}', '{"a": 1, "b": [{}, {}]'):
        with pytest.raises(Exception, match="too many values"):
            parsed(text.encode(), objects=2, values=9)
    with pytest.raises(Exception, match="too many values"):
        parsed(bomb('"{"', 1_000_000), objects=SPARE, values=SPARE)


def test_every_allowed_image_may_be_sent_as_numbers() -> None:
    """The largest document that `max_total_pixels` allows, with one list per pixel."""
    shape = (3, 7, 9, 3)
    text = json.dumps({"inputs": [{"shape": shape, "data": np.ones(shape, int).tolist()}]}).encode()
    assert parsed(text, objects=SPARE, values=3 * 3 * 7 * 9 + 4)["inputs"], (
        "four that are no values: two objects, a shape"
    )
