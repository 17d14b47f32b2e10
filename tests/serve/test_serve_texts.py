"""Texts with images, and texts alone, over HTTP."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.http as http_client
from grpc import RpcError
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.grpc.service_pb2 import ModelInferRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from refract.augment.preprocess import Preprocess
from refract.models.bundle.bundle import Bundle, BundleError, BundleInfo, GoldenSample, load_bundle, save_bundle
from refract.models.classifier import Classifier, probabilities
from refract.models.factory import text_record
from refract.models.multimodal.fusion import Reader
from refract.models.multimodal.text_networks import make_text_encoder
from refract.models.multimodal.tokens import pad_rows
from refract.models.registry import build
from refract.serve.client import Client, ServerError
from refract.serve.http.app import create_app
from refract.serve.http.transport.server import address, listen
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.service import Service

PREPROCESS = Preprocess(height=32, width=32)
LABELS = tuple(f"class {i}" for i in range(4))


def make(folder: Path, make_image, *, images: bool) -> Bundle:
    """Save an untrained bundle whose predictions differ between inputs."""
    torch.manual_seed(3)
    part, tokens, network = make_text_encoder(
        "hashing", weights="none", max_length=6, pooling="auto", args={"buckets": 500}
    )
    shown = build("lenet5", 4, image_size=(32, 32)) if images else None
    joined = {"fusion": "gated", "width": 32}
    reader = Reader(shown, network, 4, **joined)
    torch.nn.init.normal_(reader.no_text), torch.nn.init.normal_(network.vectors.weight)
    if images:
        torch.nn.init.normal_(reader.no_image)
    classifier = Classifier(reader, mean=PREPROCESS.mean, std=PREPROCESS.std, tokens=tokens).eval()
    golden_samples = []
    for i, (text, there) in enumerate(
        [("a red car", images), ("a blue dog", False), ("", images)][: 3 if images else 2]
    ):
        answer = answer_of(classifier, make_image(i) if there else None, text)
        golden_samples.append(GoldenSample(f"{i:02}.jpg", make_image(i), tuple(answer.tolist()), text, there))
    info = BundleInfo(
        name="both", task="multiclass", labels=LABELS, temperature=0.3, created="2026-01-01T00:00:00+00:00",
        network={"name": "lenet5" if images else "none", "image_size": [32, 32], "args": {}},
        preprocess=PREPROCESS.to_dict(), text=text_record(part, joined),
    )  # fmt: skip
    return load_bundle(save_bundle(folder, info, classifier, golden_samples))


def answer_of(classifier: Classifier, data: bytes | None, text: str) -> np.ndarray:
    """Predict without the server's code."""
    image = np.full((32, 32, 3), 128, np.uint8) if data is None else PREPROCESS(data)
    images = torch.from_numpy(image).permute(2, 0, 1)[None] if "images" in classifier.reads else None
    with torch.inference_mode():
        logits = classifier(
            images, torch.from_numpy(pad_rows([classifier.tokens(text)[0]])), torch.tensor([data is not None])
        )
    return probabilities(logits, task="multiclass", temperature=0.3)[0].numpy()


@pytest.fixture(scope="module")
def both(tmp_path_factory, make_image) -> Bundle:
    return make(tmp_path_factory.mktemp("both") / "b", make_image, images=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, make_image) -> Bundle:
    return make(tmp_path_factory.mktemp("alone") / "b", make_image, images=False)


def confidences(answer) -> list[dict[str, float]]:
    assert answer.status_code == 200, answer.text
    return [{row["label"]: row["confidence"] for row in one["top"]} for one in answer.json()["predictions"]]


def close(predicted: dict[str, float], wanted: np.ndarray) -> bool:
    return all(abs(predicted[label] - value) < 1e-5 for label, value in zip(LABELS, wanted, strict=True))


def test_every_way_to_send_an_image_with_its_text_gives_the_same_prediction(both, serving, make_image) -> None:
    classifier, data, text = both.classifier(), make_image(5), "the blue car"
    coded = base64.b64encode(data).decode()
    with serving(create_app(Engine(both, backend="auto"))) as client:
        assert client.get("/v1/model").json()["reads"] == ["images", "texts"]
        responses = [
            client.post("/v1/predict", json={"image": coded, "text": text}),
            client.post("/v1/predict", json={"images": [coded], "texts": [text]}),
            client.post("/v1/predict", files=[("file", ("x.jpg", data)), ("text", (None, text))]),
        ]
        assert all(close(confidences(answer)[0], answer_of(classifier, data, text)) for answer in responses)
        for answer in (client.post("/v1/predict", content=data), client.post("/v1/predict", json={"image": coded})):
            assert close(confidences(answer)[0], answer_of(classifier, data, "")), "the caption is missing"
        for answer in (
            client.post("/v1/predict", json={"text": text}),
            client.post("/v1/predict", content=text.encode(), headers={"Content-Type": "text/plain; charset=utf-8"}),
            client.post("/v1/predict", content=text.encode("utf-8-sig"), headers={"Content-Type": "text/plain"}),
            client.post("/v1/predict", files=[("text", (None, text))]),
        ):
            assert close(confidences(answer)[0], answer_of(classifier, None, text)), "the image is missing"
        several = client.post("/v1/predict", json={"images": [coded, None, coded], "texts": [text, "a dog", None]})
        wanted = [
            answer_of(classifier, data, text),
            answer_of(classifier, None, "a dog"),
            answer_of(classifier, data, ""),
        ]
        assert all(map(close, confidences(several), wanted))
        flipped = confidences(client.post("/v1/predict?tta=flip", json={"image": coded, "text": text}))[0]
        assert not close(flipped, answer_of(classifier, data, text)) and abs(sum(flipped.values()) - 1) < 1e-5
        explained = client.post("/v1/predict?explain=true", json={"image": coded, "text": text})
        assert explained.status_code == 200 and "explanation" not in explained.json()["predictions"][0]


def test_the_open_inference_protocol_reads_texts_over_http_and_grpc(both, alone, serving, make_image) -> None:
    classifier, image, texts = both.classifier(), make_image(5), ["the blue car", "ein Käfer"]
    columns = {"encoded": [image, make_image(6)], "texts": [text.encode() for text in texts]}

    def ask(http, grpc, chosen) -> list[np.ndarray]:
        """The answers to binary HTTP, JSON and gRPC."""
        inputs = [
            InferInput(name, [2], "BYTES").set_data_from_numpy(np.array(columns[name], object)) for name in chosen
        ]
        by_http = [
            http_client.InferInput(name, [2], "BYTES").set_data_from_numpy(np.array(columns[name], object))
            for name in chosen
        ]
        data = {"encoded": [base64.b64encode(one).decode() for one in columns["encoded"]], "texts": texts}
        tensors = [{"name": name, "datatype": "BYTES", "shape": [2], "data": data[name]} for name in chosen]
        in_json = http.post("/v2/models/both/infer", json={"inputs": tensors}).json()["outputs"][0]
        with http_client.InferenceServerClient(f"{http.base_url.host}:{http.base_url.port}") as binary:
            first = binary.infer("both", by_http).as_numpy("probabilities")
        return [
            first,
            np.reshape(in_json["data"], in_json["shape"]),
            grpc.infer("both", inputs).as_numpy("probabilities"),
        ]

    bound = listen("127.0.0.1", 0)
    port = address(bound)
    with serving(create_app(both, grpc_socket=bound)) as http, InferenceServerClient(port) as grpc:
        for chosen in (("encoded", "texts"), ("texts", "encoded"), ("texts",), ("encoded",)):
            files = columns["encoded"] if "encoded" in chosen else [None, None]
            written = texts if "texts" in chosen else ["", ""]
            wanted = [answer_of(classifier, *pair) for pair in zip(files, written, strict=True)]
            for rows in ask(http, grpc, chosen):
                np.testing.assert_allclose(rows, wanted, atol=1e-5)
        inputs = [row.name for row in grpc.get_model_metadata("both").inputs]
        assert inputs == ["images", "encoded", "texts"]

        def problem(*tensors: tuple[str, list]) -> tuple[int, str]:
            rows = [{"name": name, "datatype": "BYTES", "shape": [len(data)], "data": data} for name, data in tensors]
            answer = http.post("/v2/models/both/infer", json={"inputs": rows})
            return answer.status_code, answer.json()["detail"]

        coded = base64.b64encode(image).decode()
        assert problem(("encoded", [coded]), ("texts", texts)) == (
            422,
            "`texts` has 2 elements for 1 images; send one text for each image",
        )
        assert problem(("texts", [" "])) == (422, "a sample has an empty text and no image; send one of them")
        assert problem(("texts", texts), ("texts", texts))[0] == problem(("texts", [3]))[0] == 422
        bad = {"name": "texts", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"\xff"]}}
        with pytest.raises(RpcError, match="not valid UTF-8"):
            GRPCInferenceServiceStub(grpc._channel).ModelInfer(ModelInferRequest(model_name="both", inputs=[bad]))
    with serving(create_app(alone)) as http:
        assert [row["name"] for row in http.get("/v2/models/both").json()["inputs"]] == ["texts"]
        image_alone = {"name": "encoded", "datatype": "BYTES", "shape": [1], "data": [coded]}
        answer = http.post("/v2/models/both/infer", json={"inputs": [image_alone]})
        assert (answer.status_code, answer.json()["detail"]) == (422, "this model reads no images, only texts")


def test_long_texts_are_truncated_as_in_training_and_the_response_says_so(both, serving, make_image) -> None:
    with serving(create_app(both)) as client:
        long, short = (
            client.post("/v1/predict", json={"text": f"one two three four five six{more}"}) for more in (" seven", "")
        )
        assert long.json()["predictions"][0]["text_truncated"] is True
        assert "text_truncated" not in short.json()["predictions"][0]
        assert confidences(long) == confidences(short)
        vast = client.post("/v1/predict", content=b"word " * 200_000, headers={"Content-Type": "text/plain"})
        assert vast.json()["predictions"][0]["text_truncated"] is True


@pytest.mark.parametrize("text", ["\x00\x07", "😀", "日本語", "\u202eabc", "e\u0301", "a" * 100_000, "\ud800"])
def test_unusual_texts_never_cause_a_server_error(alone, serving, text: str) -> None:
    with serving(create_app(alone)) as client:
        for document, statuses in (({"text": f"word {text}"}, (200,)), ({"texts": ["a", text]}, (200, 422))):
            answer = client.post(
                "/v1/predict", content=json.dumps(document), headers={"Content-Type": "application/json"}
            )
            assert answer.status_code in statuses, answer.text


@pytest.mark.slow
def test_inputs_that_the_model_does_not_read_are_rejected(both, alone, bundle, serving, make_image) -> None:
    coded = base64.b64encode(make_image(1)).decode()
    cases = [
        (bundle, {"json": {"image": coded, "text": "a"}}, 422, "reads no texts"),
        (bundle, {"json": {"text": "a"}}, 422, "reads no texts"),
        (alone, {"content": make_image(1)}, 422, "reads no images"),
        (alone, {"json": {"image": coded, "text": "a"}}, 422, "reads no images"),
        (alone, {"json": {"text": " "}}, 422, "empty text and no image"),
        (alone, {"json": {"text": "\x00\x07 \n"}}, 422, "empty text and no image"),
        (both, {"json": {"images": [coded, None], "texts": ["", ""]}}, 422, "empty text and no image"),
        (both, {"json": {"images": [None]}}, 422, "empty text and no image"),
        (bundle, {"json": {"images": [None]}}, 422, "empty text and no image"),
        (both, {"json": {"images": [coded], "texts": ["a", "b"]}}, 422, "as many"),
        (both, {"json": {"images": [coded], "texts": [3]}}, 422, "each text must be a string or null"),
        (both, {"json": {"images": [coded] * 65, "texts": ["a"] * 65}}, 413, "65 images"),
        (both, {"json": {"texts": ["a"] * 65}}, 413, "65 texts in one request; at most 64"),
        (both, {"files": [("file", ("x", make_image(1))), *[("text", (None, t)) for t in "ab"]]}, 422, "1 files and 2 fields `text`"),
        (both, {"content": b"\xff\xfe", "headers": {"Content-Type": "text/plain"}}, 400, "not valid UTF-8"),
        (both, {"files": [("text", (None, "a"))] * 65}, 413, "the form has more than 64 texts"),
        (both, {"files": [("other", (None, "a"))]}, 400, "the form has no file"),
    ]  # fmt: skip
    for served, question, status, says in cases:
        with serving(create_app(served)) as client:
            answer = client.post("/v1/predict", **question)
            assert (answer.status_code, says in answer.json()["detail"]) == (status, True), (says, answer.text)


def test_the_open_inference_protocol_accepts_only_images(both, alone, serving, make_image) -> None:
    coded = {
        "inputs": [
            {"name": "encoded", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(make_image(4)).decode()]}
        ]
    }
    with serving(create_app(both)) as client:
        outputs = client.post("/v2/models/both/infer", json=coded).json()["outputs"][0]["data"]
        assert np.allclose(outputs, answer_of(both.classifier(), make_image(4), ""), atol=1e-5), "the text is missing"
    with serving(create_app(alone)) as client:
        refused = client.post("/v2/models/both/infer", json=coded)
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
        assert refused.json()["detail"] == "this model reads no images, only texts"
        assert refused.headers["content-type"] == "application/problem+json"
        explained = client.post("/v1/predict?explain=true", json={"text": "a car"})
        assert explained.status_code == 200 and "explanation" not in explained.json()["predictions"][0]


def test_the_clients_send_texts(both, serving, make_image, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from refract.serve.cli.predict import main

    (tmp_path / "x.jpg").write_bytes(make_image(2))
    classifier = both.classifier()
    with serving(create_app(both)) as http, Client(str(http.base_url)) as client:
        predictions = client.predict([tmp_path / "x.jpg", make_image(3)], texts=["a red dog", "a car"])
        assert [row["label"] for row in predictions] == [
            LABELS[answer_of(classifier, make_image(i), text).argmax()] for i, text in ((2, "a red dog"), (3, "a car"))
        ]
        assert client.predict([], texts=["a car"])[0]["label"] == LABELS[answer_of(classifier, None, "a car").argmax()]
        with pytest.raises(ServerError, match="send one text for each"):
            client.predict([make_image(1)], texts=["a", "b"])
        with pytest.raises(TypeError):
            client.predict([make_image(1)], texts="a")
        assert main(["--url", str(http.base_url), "--text", "a car"]) == 0
        assert capsys.readouterr().out.startswith(f"text: {LABELS[answer_of(classifier, None, 'a car').argmax()]} ")


def test_a_swap_to_a_model_with_other_inputs_is_rejected(both, alone, served) -> None:
    async def story(service: Service) -> None:
        with pytest.raises(
            BundleError, match="reads texts, but both reads images and texts; start another server for it"
        ):
            await service.models.swap(Engine(alone))
        assert service.models.engine.bundle.digest == both.digest

    served(Engine(both), story)


def test_a_wrong_golden_text_and_an_image_only_backend_are_reported(both, tmp_path: Path) -> None:
    import dataclasses

    first = both.golden_samples[0]
    changed = dataclasses.replace(
        both, golden_samples=(dataclasses.replace(first, text="another text entirely"), *both.golden_samples[1:])
    )
    Engine(both).self_test()
    with pytest.raises(BundleError, match="golden sample 00.jpg"):
        Engine(changed).self_test()
    with pytest.raises(BundleError, match="computes image models only"):
        Engine(both, backend="openvino")
