"""Embeddings over HTTP, from the same forward pass as the predictions."""

import base64
import json

import numpy as np
import pytest
import torch

from refract.serve.client import Client
from refract.serve.http.app import create_app
from refract.serve.runtime.engine import Engine


@pytest.fixture(scope="module")
def http(bundle, serving):
    with serving(create_app(bundle)) as client:
        yield client


@pytest.fixture(scope="module")
def head(bundle) -> torch.nn.Module:
    """The linear layer that maps an embedding to logits."""
    return bundle.classifier().network.head


def probabilities(bundle, head: torch.nn.Module, embedding: list[float]) -> np.ndarray:
    with torch.inference_mode():
        return (head(torch.tensor(embedding)) / bundle.info.temperature).softmax(0).numpy()


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_an_embedding_belongs_to_its_prediction(http, bundle, head, make_image, tta: str) -> None:
    files = [("f", (f"{i}.jpg", make_image(i))) for i in range(3)]
    plain = http.post(f"/v1/predict?top=10&tta={tta}", files=files).json()["predictions"]
    assert all("embedding" not in row for row in plain)
    rows = http.post(f"/v1/predict?top=10&embed=true&tta={tta}", files=files).json()["predictions"]
    for row, other in zip(rows, plain, strict=True):
        by_label = {entry["label"]: entry["confidence"] for entry in other["top"]}
        expected = [by_label[label] for label in bundle.info.labels]
        np.testing.assert_allclose(probabilities(bundle, head, row["embedding"]), expected, atol=1e-4)
    response = http.post(f"/v1/embed?tta={tta}", files=files)
    assert response.json().keys() == {"model", "embeddings"} and "Server-Timing" in response.headers
    np.testing.assert_allclose(response.json()["embeddings"], [row["embedding"] for row in rows], atol=1e-5)


def test_the_embed_route_rejects_what_predict_rejects(http, make_image) -> None:
    for query, content, code in (("?top=3", make_image(1), "invalid_parameter"), ("", b"no image", "invalid_image")):
        response = http.post(f"/v1/embed{query}", content=content)
        assert response.json()["code"] == code, response.text


def test_the_client_returns_embeddings(http, make_image) -> None:
    expected = http.post("/v1/embed", content=make_image(1)).json()["embeddings"]
    with Client(str(http.base_url)) as client:
        np.testing.assert_allclose(client.embed([make_image(1)]), expected, atol=1e-5)
        np.testing.assert_allclose(client.predict([make_image(1)], embed=True)[0]["embedding"], expected[0], atol=1e-5)


def test_the_open_inference_protocol_has_the_embedding_on_request(http, make_image) -> None:
    outputs = http.get("/v2/models/shapes").json()["outputs"]
    assert {"name": "embedding", "datatype": "FP32", "shape": [-1, -1]} in outputs
    data = base64.b64encode(make_image(1)).decode()
    tensor = {"name": "encoded", "datatype": "BYTES", "shape": [1], "data": [data]}

    def infer(**fields) -> dict:
        response = http.post("/v2/models/shapes/infer", content=json.dumps({"inputs": [tensor], **fields}))
        return {output["name"]: output for output in response.json()["outputs"]}

    assert infer().keys() == {"probabilities", "label"}
    output = infer(outputs=[{"name": "embedding"}])
    assert output.keys() == {"embedding"} and output["embedding"]["shape"] == [1, 84]
    (expected,) = http.post("/v1/embed", content=make_image(1)).json()["embeddings"]
    np.testing.assert_allclose(output["embedding"]["data"], expected, atol=1e-5)


def test_a_backend_without_embeddings_is_reported(bundle, serving, make_image) -> None:
    engine = Engine(bundle)
    forward = engine._forward
    engine._forward = lambda images: (forward(images)[0], torch.empty(len(images), 0))
    with serving(create_app(engine)) as client:
        assert client.post("/v1/predict", content=make_image(1)).status_code == 200
        for path in ("/v1/predict?embed=true", "/v1/embed"):
            response = client.post(path, content=make_image(1))
            assert (response.status_code, response.json()["code"]) == (422, "no_embedding")
