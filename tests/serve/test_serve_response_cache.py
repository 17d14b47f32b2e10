"""The response cache: a repeated request is answered without the network, by the model that answered it before, and counted as usual."""

import asyncio
import json
import time

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput

from refract.serve.http.app import create_app
from refract.serve.http.transport.server import address, listen
from refract.serve.requests.decoding import RequestImages
from refract.serve.rollout.canary import Challenge
from refract.serve.rollout.data_capture import DataCapture
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.response_cache import ENTRY_BYTES, Cached, Key, ResponseCache, content_hash


class Counting(Engine):
    """Counts the images that it computes."""

    computed = 0

    def compute(self, batch):
        self.computed += len(batch)
        return super().compute(batch)


def value(app, name: str, **labels: str) -> float | None:
    return app.state.service.metrics.registry.get_sample_value(name, labels)


def cached(app) -> dict[str, float | None]:
    return {end: value(app, "refract_cache_requests_total", end=end) for end in ("hit", "miss")}


def entry(numbers: int) -> Cached:
    return Cached(np.zeros(numbers, np.float32), ())


def test_the_least_recently_used_entries_go_first_and_the_memory_is_bounded() -> None:
    size = 400 + ENTRY_BYTES
    cache = ResponseCache(2 * size)
    first, second, third = (Key("model", False, bytes([i])) for i in range(3))
    cache.put(first, entry(100))
    cache.put(second, entry(100))
    assert cache.get(first)
    cache.put(third, entry(100))
    assert [cache.get(key) is not None for key in (first, second, third)] == [True, False, True]
    cache.put(second, entry(10_000))
    assert cache.get(second) is None and cache.used_bytes == 2 * size, "an entry larger than the cache is not stored"
    cache.put(first, entry(100))
    assert cache.used_bytes == 2 * size
    with pytest.raises(ValueError, match="read-only"):
        cache.get(first).outputs[0] = 1


def test_different_contents_have_different_hashes() -> None:
    def encoded(*images: bytes | None, texts: tuple[str, ...] = ()) -> RequestImages:
        return RequestImages(len(images), 0, [], images, [str(i) for i in range(len(images))], texts=texts)

    def pixels(*shape: int, value: int = 0) -> RequestImages:
        return RequestImages(shape[0], 0, [], pixels=np.full(shape, value, np.uint8))

    different = [
        encoded(b"ab"), encoded(b"a", b"b"), encoded(b"", b"ab"), encoded(b"ab", None), encoded(None, b"ab"), encoded(b"ba"),
        encoded(b"ab", texts=("x",)), encoded(b"ab", texts=("\ud800",)), encoded(b"abx"), encoded(None, texts=("ab",)),
        pixels(1, 2, 3, 3), pixels(1, 3, 2, 3), pixels(1, 2, 3, 3, value=1),
    ]  # fmt: skip
    assert len({content_hash(images) for images in different}) == len(different)
    renamed = encoded(b"ab")._replace(names=["the image"])
    assert content_hash(renamed) == content_hash(encoded(b"ab"))


def test_a_repeated_request_is_not_computed_in_any_protocol(bundle, serving, make_image) -> None:
    engine, bound, image = Counting(bundle), listen("127.0.0.1", 0), make_image(3)
    port = address(bound)
    app = create_app(engine, cache_mb=1, grpc_socket=bound)
    with serving(app) as http, InferenceServerClient(port) as grpc:
        tested = engine.computed  # the self-test's images
        first = http.post("/v1/predict", content=image, headers={"X-Request-Id": "one"})
        assert "queue;dur=" in first.headers["server-timing"] and engine.computed == tested + 1
        again = http.post("/v1/predict", content=image, headers={"X-Request-Id": "two"})
        assert again.json() == first.json() and "cache;dur=" in again.headers["server-timing"]
        form = http.post("/v1/predict?top=1&threshold=0.5&embed=true", files={"file": ("x.jpg", image)})
        (row,) = form.json()["predictions"]
        assert row["label"] == first.json()["predictions"][0]["label"] and len(row["top"]) == 1 and row["embedding"]
        tensor = InferInput("encoded", [1], "BYTES").set_data_from_numpy(np.array([image], dtype=object))
        answer = grpc.infer("shapes", [tensor], request_id="7")
        assert answer.get_response().id == "7"
        assert answer.as_numpy("probabilities").max() == pytest.approx(first.json()["predictions"][0]["confidence"])
        assert engine.computed == tested + 1 and cached(app) == {"hit": 3, "miss": 1}
        assert 0 < value(app, "refract_cache_bytes") < 2000
        for request_id in ("one", "two"):
            feedback = {"id": request_id, "labels": ["class 1"]}
            assert http.post("/v1/feedback", json=feedback).status_code == 200
        (model,) = http.get("/v2/models/shapes/stats").json()["model_stats"]
        stats = {name: model["inference_stats"][name]["count"] for name in ("success", "cache_hit", "cache_miss")}
        assert stats == {"success": 4, "cache_hit": 3, "cache_miss": 1} and model["inference_count"] == 1
        assert value(app, "refract_requests_total", end="ok") == value(app, "refract_confidence_count") == 4
        http.post("/v1/predict?tta=flip", content=image)
        assert (engine.computed, cached(app)) == (tested + 3, {"hit": 3, "miss": 2})
        for _ in range(2):
            assert "explain;dur=" in http.post("/v1/predict?explain=true", content=image).headers["server-timing"]
        assert cached(app) == {"hit": 3, "miss": 2}, "heat maps need the image"


def test_errors_are_not_stored(bundle, serving) -> None:
    app = create_app(bundle, cache_mb=1)
    with serving(app) as http:
        for _ in range(2):
            assert http.post("/v1/predict", content=b"\xff\xd8\xff\xe0" + b"x" * 20_000).status_code == 400
    assert value(app, "refract_cache_bytes") == 0


def test_a_swap_never_leaves_a_stale_answer(bundle, other, serving, make_image) -> None:
    app, image = create_app(bundle, cache_mb=1), make_image(4)
    models = app.state.service.models

    def swap(engine: Engine) -> None:
        asyncio.run_coroutine_threadsafe(models.swap(engine), models.champion._loop).result(30)

    with serving(app) as http:
        answers = []
        for engine in (None, Engine(other), Engine(bundle)):
            if engine:
                swap(engine)
            answers += [http.post("/v1/predict", content=image).json() for _ in range(2)]
    digests = [answer["model"]["digest"] for answer in answers]
    assert digests == [bundle.digest] * 2 + [other.digest] * 2 + [bundle.digest] * 2
    assert answers[0] == answers[1] == answers[4] == answers[5] and answers[2] == answers[3] != answers[0]
    assert cached(app) == {"hit": 4, "miss": 2}


@pytest.mark.parametrize("answers", [True, False], ids=["canary", "shadow"])
def test_a_challenger_gets_its_fraction_of_the_repeated_requests(bundle, other, serving, make_image, answers) -> None:
    challenger = Counting(other)
    app = create_app(bundle, cache_mb=1, challenge=Challenge(challenger, fraction=1, answers=answers))
    with serving(app) as http:
        tested = challenger.computed
        for _ in range(3):
            digest = http.post("/v1/predict", content=make_image(5)).json()["model"]["digest"]
            assert digest == (other if answers else bundle).digest
        ends = ("answered",) if answers else ("agreed", "differed")
        deadline = time.monotonic() + 20
        while sum(value(app, "refract_challenger_images_total", end=end) or 0 for end in ends) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert challenger.computed == tested + (1 if answers else 3), "a shadow is measured without the cache"
    assert cached(app) == {"hit": 2, "miss": 1}


def test_captured_requests_are_computed(bundle, serving, make_image, tmp_path) -> None:
    sampling = DataCapture(tmp_path, fraction=1, most_bytes=1 << 20, below=0)
    app = create_app(bundle, cache_mb=1, sampling=sampling)
    with serving(app) as http:
        for _ in range(3):
            assert http.post("/v1/predict", content=make_image(6)).status_code == 200
    rows = [json.loads(line) for file in tmp_path.glob("inputs-*.jsonl") for line in file.read_text().splitlines()]
    assert len(rows) == 3 and cached(app) == {"hit": None, "miss": None}
