"""The HTTP API on a real port: predictions, health, OpenAPI document."""

import asyncio
import base64
import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from refract.models.classifier import probabilities
from refract.serve.http.app import create_app
from refract.serve.requests.limits import Limits
from refract.serve.runtime.engine import Engine

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def client(bundle, serving):
    limits = Limits(max_body_bytes=200_000, max_pixels=1_000_000, max_images=4)
    with serving(create_app(bundle, limits=limits)) as client:
        yield client


def confidences(answer: httpx.Response, index: int = 0) -> np.ndarray:
    """Return the probabilities of one prediction, in the order of the labels."""
    assert answer.status_code == 200, answer.text
    by_label = {entry["label"]: entry["confidence"] for entry in answer.json()["predictions"][index]["top"]}
    return np.array([by_label[f"class {i}"] for i in range(10)], dtype=np.float32)


def test_http_engine_and_plain_classifier_agree(client, bundle, make_image, reference):
    engine, classifier = Engine(bundle), bundle.classifier("cpu")
    for form in ("JPEG", "PNG", "WEBP"):
        data = make_image(7, size=(90, 60), form=form)
        expected = reference(classifier, data, "multiclass")
        assert expected.max() > 0.2  # far from uniform, so agreement means something
        np.testing.assert_allclose(engine.predict(engine.preprocess(data)[None])[0], expected, atol=1e-6)
        answer = client.post("/v1/predict?top=10", content=data, headers={"content-type": "image/jpeg"})
        np.testing.assert_allclose(confidences(answer), expected, atol=1e-6)


def test_every_form_of_body_gives_the_same_prediction(client, make_image):
    data, url = make_image(8), "/v1/predict?top=10"
    wrapped = base64.encodebytes(data).decode()
    answers = [
        client.post(url, content=data, headers={"content-type": "application/octet-stream"}),
        client.post(url, content=data),
        client.post(url, content=iter([data[:100], data[100:]]), headers={"content-type": "image/png"}),
        client.post(url, files={"anything": ("a.jpg", data)}),
        client.post(url, files={"anything": ("a.jpg", data)}, data={"note": "a text field is passed over"}),
        client.post(url, json={"image": wrapped}),
        client.post(url, json={"images": [wrapped]}),
    ]
    for answer in answers:
        np.testing.assert_allclose(confidences(answer), confidences(answers[0]), atol=1e-6)


def test_predictions_keep_the_order_of_the_images(client, make_image):
    images = [make_image(i) for i in range(4)]
    alone = [confidences(client.post("/v1/predict?top=10", content=data)) for data in images]
    form = client.post("/v1/predict?top=10", files=[("f", ("x.jpg", data)) for data in images])
    texts = [base64.b64encode(data).decode() for data in images]
    for answer in (form, client.post("/v1/predict?top=10", json={"images": texts})):
        for i, expected in enumerate(alone):
            np.testing.assert_allclose(confidences(answer, i), expected, atol=1e-6)


def test_the_response_names_the_model_and_the_top_labels(client, bundle, make_image):
    answer = client.post("/v1/predict?top=3", content=make_image(1)).json()
    assert answer["model"] == {"name": "shapes", "digest": bundle.digest}
    (prediction,) = answer["predictions"]
    assert set(prediction) == {"label", "confidence", "top"}
    assert len(prediction["top"]) == 3
    assert prediction["top"][0] == {"label": prediction["label"], "confidence": prediction["confidence"]}
    assert sorted(prediction["top"], key=lambda entry: -entry["confidence"]) == prediction["top"]
    assert len(client.post("/v1/predict", content=make_image(1)).json()["predictions"][0]["top"]) == 5
    assert len(client.post("/v1/predict?top=99", content=make_image(1)).json()["predictions"][0]["top"]) == 10, "all"


def test_multilabel_lists_the_labels_above_their_thresholds(make_bundle, serving, tmp_path, make_image, reference):
    data = make_image(5)
    plain = make_bundle(tmp_path / "plain", task="multilabel", thresholds=[0.5] * 10)
    expected = reference(plain.classifier("cpu"), data, "multilabel")
    thresholds = [max(p - 0.01, 0) if i % 2 else min(p + 0.01, 1) for i, p in enumerate(expected.tolist())]
    served = make_bundle(tmp_path / "served", task="multilabel", thresholds=thresholds)
    with serving(create_app(served)) as client:
        (prediction,) = client.post("/v1/predict", content=data).json()["predictions"]
    assert prediction["labels"] == [f"class {i}" for i in range(10) if i % 2]
    # The confidence covers every label of the prediction: those listed and those not.
    sure = float(np.where(np.arange(10) % 2, expected, 1 - expected).mean())
    for below, abstains in ((sure - 0.01, False), (sure + 0.01, True)):
        changed = dataclasses.replace(served, info=dataclasses.replace(served.info, abstain_below=below))
        with serving(create_app(changed)) as client:
            assert client.post("/v1/predict", content=data).json()["predictions"][0]["abstain"] is abstains


def test_health_routes_and_the_openapi_document(client, bundle):
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready", "model": "shapes"}
    model = client.get("/v1/model").json()
    assert model["digest"] == bundle.digest
    assert model["network"]["name"] == "lenet5"
    assert model["device"] == "cpu"
    fields = {"name", "task", "labels", "preprocess", "metrics", "created", "versions"}
    assert fields <= set(model)
    assert client.get("/openapi.json").status_code == 200


def test_tta_averages_an_image_and_its_horizontal_flip(make_bundle, serving, tmp_path, make_image):
    data = make_image(3)
    for task, thresholds in (("multiclass", ()), ("multilabel", [0.5] * 10)):
        served = make_bundle(tmp_path / task, task=task, thresholds=thresholds)
        engine = Engine(served)
        pixels = torch.from_numpy(engine.preprocess(data)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            classifier = served.classifier("cpu")
            logits = (classifier(pixels) + classifier(pixels.flip(3))) / 2
            wanted = probabilities(logits, task=task, temperature=served.info.temperature)[0].numpy()
        with serving(create_app(served)) as client:
            plain = confidences(client.post("/v1/predict?top=10", content=data))
            tta_confidences = confidences(client.post("/v1/predict?top=10&tta=flip", content=data))
            assert client.post("/v1/predict?tta=turn", content=data).status_code == 422
        np.testing.assert_allclose(tta_confidences, wanted, atol=1e-4)
        assert np.abs(tta_confidences - plain).max() > 1e-3


def test_threshold_and_abstention(bundle, serving, make_image, reference):
    data = make_image(5)
    row = reference(bundle.classifier("cpu"), data, "multiclass")
    for below, abstains in ((0.0, False), (float(row.max()) + 0.01, True), (1.0, True)):
        changed = dataclasses.replace(bundle, info=dataclasses.replace(bundle.info, abstain_below=below))
        with serving(create_app(changed)) as client:
            (answer,) = client.post("/v1/predict?threshold=0.1", content=data).json()["predictions"]
        assert answer["abstain"] is abstains
        assert answer["labels"] == [f"class {i}" for i in range(10) if row[i] >= 0.1]


def test_server_timing_lists_the_stages(client, make_image, bundle):
    answer = client.post("/v1/predict", content=make_image(1))
    stages = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert set(stages) == {"prepare", "queue", "compute"} and all(0 <= float(ms) < 10_000 for ms in stages.values())
    assert bundle.digest.startswith(answer.headers["x-model-digest"])


def test_the_openapi_examples_match_the_responses(client):
    operation = client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]
    answer = client.post("/v1/predict", json=operation["requestBody"]["content"]["application/json"]["example"])
    example = operation["responses"]["200"]["content"]["application/json"]["example"]
    assert answer.status_code == 200 and answer.json().keys() == example.keys()
    assert answer.json()["predictions"][0].keys() | {"abstain", "familiarity", "explanation", "explanation_method"} == (
        example["predictions"][0].keys()
    )
    for status, response in operation["responses"].items():
        if status != "200":
            problem = response["content"]["application/problem+json"]["example"]
            assert problem.keys() == {"type", "title", "status", "detail", "code"} and problem["status"] == int(status)


class BrokenEngine(Engine):
    def compute(self, batch):
        if batch.mean() < 1:  # a black image
            raise RuntimeError("a secret of the engine")
        return super().compute(batch)


def test_an_engine_failure_is_a_500_without_internals_for_one_request(bundle, serving, make_image):
    with serving(create_app(BrokenEngine(bundle), max_wait_ms=0)) as client:
        failed = client.post("/v1/predict", content=black_png(32, 32))
        assert client.post("/v1/predict", content=make_image(1)).status_code == 200
    assert failed.status_code == 500
    problem = {"type": "about:blank", "title": "Internal Server Error", "status": 500, "code": "internal_error"}
    assert failed.json() == {**problem, "detail": "an internal error occurred; the server's log has the details"}
    assert failed.headers["content-type"] == "application/problem+json"


def black_png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_server_is_not_ready_before_the_self_test(bundle):
    async def ask() -> tuple[httpx.Response, ...]:
        transport = httpx.ASGITransport(create_app(bundle))  # runs no lifespan
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (
                await client.get("/readyz"),
                await client.post("/v1/predict", content=b"x"),
                await client.get("/livez"),
            )

    ready, predict, live = asyncio.run(ask())
    assert (ready.status_code, predict.status_code, live.status_code) == (503, 503, 200)
    assert ready.json()["code"] == "not_ready"


@pytest.mark.slow
def test_serving_imports_no_training_stack():
    heavy = "('lightning', 'mlflow', 'matplotlib', 'pandas', 'torchmetrics', 'sklearn', 'pytorch_lightning')"
    code = f"import sys, refract.serve.http.app, refract.serve.rollout.model_source; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
