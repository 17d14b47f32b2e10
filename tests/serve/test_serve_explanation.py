"""Heat maps: response fields, deadline, order, and cancellation."""

import asyncio
import base64
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from refract.augment.preprocess import Preprocess
from refract.models.occlusion import BATCH, PASSES
from refract.serve.http.app import create_app
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.explanation import Explanations, png


@pytest.fixture(scope="module")
def image(bundle, make_image) -> np.ndarray:
    """A network input with a region that supports the label."""
    return Preprocess.from_dict(bundle.info.preprocess)(make_image(4))


@pytest.fixture(scope="module")
def row(bundle, image) -> np.ndarray:
    return Engine(bundle).predict(image[None])


class Counting(Engine):
    """An engine that counts the images of its heat maps. Each pass waits for `gate`."""

    def __init__(self, bundle) -> None:
        super().__init__(bundle)
        self.passed, self.gate, self.started = 0, threading.Event(), threading.Event()
        self.gate.set()
        forward = self._forward

        def counted(images: torch.Tensor) -> torch.Tensor:
            if threading.current_thread().name.startswith("explain"):
                self.started.set()
                assert self.gate.wait(20)
                self.passed += len(images)
            return forward(images)

        self._forward = counted


def test_a_heat_map_is_red_at_1_and_transparent_at_0() -> None:
    heat = np.zeros((32, 32), np.float32)
    heat[4:8, 4:8] = 1
    layer = np.asarray(Image.open(io.BytesIO(png(heat))))
    assert layer.shape == (32, 32, 4) and layer[5, 5, 3] > 150 and layer[25, 25, 3] == 0
    assert layer[5, 5, 0] > layer[5, 5, 2]


def test_the_response_has_a_heat_map_of_the_input_size_and_the_method(bundle, serving, make_image) -> None:
    with serving(create_app(bundle)) as client:
        answer = client.post("/v1/predict?explain=true", content=make_image(4))
        (prediction,) = answer.json()["predictions"]
        assert Image.open(io.BytesIO(base64.b64decode(prediction["explanation"]))).size == (32, 32)
        assert prediction["explanation_method"] == "occlusion" and "explanation_problem" not in prediction
        assert "explain;dur=" in answer.headers["server-timing"]
        plain = client.post("/v1/predict", content=make_image(4)).json()["predictions"][0]
        assert not any(key.startswith("explanation") for key in plain) and plain["top"] == prediction["top"]


def test_an_image_without_evidence_has_no_heat_map(bundle, serving) -> None:
    """Each window of a grey image is occluded with the same grey."""
    data = io.BytesIO()
    Image.new("RGB", (32, 32), (90, 90, 90)).save(data, "PNG")
    with serving(create_app(bundle)) as client:
        (prediction,) = client.post("/v1/predict?explain=true", content=data.getvalue()).json()["predictions"]
        assert prediction["explanation_problem"]["code"] == "no_evidence" and "explanation" not in prediction


def test_a_map_that_would_exceed_the_deadline_is_abandoned_after_one_step(bundle, image, row) -> None:
    async def story() -> None:
        engine, explanations = Counting(bundle), Explanations()
        due = asyncio.get_running_loop().time() + 1e-9
        late = await explanations.of(engine, image[None], row, due)
        (in_time,) = await explanations.of(engine, image[None], row, float("inf"))
        explanations.close()
        assert late[0].code == "deadline_exceeded" and late[0].png is None
        assert in_time.png is not None and engine.passed <= BATCH + PASSES

    asyncio.run(story())


def test_a_waiting_request_stops_at_its_deadline(bundle, image, row) -> None:
    async def story() -> None:
        engine, explanations = Counting(bundle), Explanations()
        engine.gate.clear()
        first = asyncio.create_task(explanations.of(engine, image[None], row, float("inf")))
        await asyncio.to_thread(engine.started.wait, 20)
        due = asyncio.get_running_loop().time() + 0.01
        second = await explanations.of(engine, np.stack([image] * 2), row.repeat(2, axis=0), due)
        assert [one.code for one in second] == ["deadline_exceeded"] * 2
        engine.gate.set()
        assert (await first)[0].png is not None
        explanations.close()

    asyncio.run(story())


def test_a_cancelled_request_stops_after_the_current_step(bundle, image, row) -> None:
    async def story() -> None:
        engine, explanations = Counting(bundle), Explanations()
        engine.gate.clear()
        gone = asyncio.create_task(explanations.of(engine, image[None], row, float("inf")))
        await asyncio.to_thread(engine.started.wait, 20)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        engine.gate.set()
        (after,) = await explanations.of(engine, image[None], row, float("inf"))  # the thread is idle again
        explanations.close()
        assert after.png is not None and engine.passed == BATCH + PASSES

    asyncio.run(story())
