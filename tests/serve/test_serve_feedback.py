"""Feedback: which predictions it can judge, what it counts, and how the server refuses it."""

import asyncio
import hashlib
import json
from pathlib import Path

import httpx
import numpy as np
import pytest

from refract.serve.feedback.feedback_log import MOST_IMAGES, CapturedImage, FeedbackLog
from refract.serve.http.app import create_app
from refract.serve.http.auth import ApiKeys
from refract.serve.requests.limits import Limits
from refract.serve.rollout.canary import Challenge
from refract.serve.rollout.data_capture import DataCapture
from refract.serve.runtime.engine import Engine

LABELS = [f"class {i}" for i in range(10)]


@pytest.fixture(scope="module")
def client(bundle, serving, tmp_path_factory):
    """A server that keeps 50 predictions and writes feedback."""
    log = FeedbackLog(tmp_path_factory.mktemp("feedback"))
    with serving(create_app(bundle, limits=Limits(max_images=4), feedback_keep=50, feedback_log=log)) as client:
        yield client


@pytest.fixture(scope="module")
def multilabel(make_bundle, tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "m", task="multilabel", thresholds=[0.5] * 10)


def predict(client: httpx.Client, *images: bytes, **headers: str) -> tuple[str, list[str]]:
    """Return the request id and the predicted labels."""
    response = client.post("/v1/predict", files=[("f", (f"{i}.jpg", x)) for i, x in enumerate(images)], headers=headers)
    assert response.status_code == 200, response.text
    return response.headers["x-request-id"], [row["label"] for row in response.json()["predictions"]]


def send(client: httpx.Client, **content: object) -> tuple[int, dict]:
    response = client.post("/v1/feedback", json=content)
    return response.status_code, response.json()


def problem(client: httpx.Client, **content: object) -> tuple[int, str, str]:
    status, answer = send(client, **content)
    return status, answer["code"], answer["detail"]


def other_than(label: str) -> str:
    return next(name for name in LABELS if name != label)


def test_feedback_judges_the_prediction_of_its_request(client, bundle, make_image) -> None:
    request_id, (label,) = predict(client, make_image(1))
    expected = {"id": request_id, "index": 0, "model": bundle.digest[:16], "predicted": [label]}
    assert send(client, id=request_id, labels=[label]) == (200, expected | {"correct": True, "replaced": False})
    wrong = other_than(label)
    assert send(client, id=request_id, labels=[wrong]) == (200, expected | {"correct": False, "replaced": True})
    assert send(client, id=request_id, labels=[wrong, wrong])[1]["correct"] is False, "a label named twice is one label"


def test_an_image_of_several_needs_its_index(client, make_image) -> None:
    request_id, labels = predict(client, *map(make_image, range(3)))
    for index, label in enumerate(labels):
        status, answer = send(client, id=request_id, labels=[label], index=index)
        assert (status, answer["index"], answer["correct"], answer["predicted"]) == (200, index, True, [label])
    message = "the request has 3 images; add the member index, 0 … 2"
    assert problem(client, id=request_id, labels=labels[:1]) == (422, "invalid_request", message)
    status, code, detail = problem(client, id=request_id, labels=labels[:1], index=3)
    assert (status, code) == (422, "invalid_request") and "index 3" in detail
    for index in (2**61 - 1, 2**61, 10**30):  # Python hashes the first two like 0 and 1
        assert problem(client, id=request_id, labels=labels[:1], index=index)[:2] == (422, "invalid_request")


def test_the_latest_request_with_an_id_counts(client, make_image) -> None:
    images = {predict(client, make_image(seed))[1][0]: make_image(seed) for seed in range(12)}
    (first, second), header = list(images)[:2], {"X-Request-Id": "order-7"}
    predict(client, images[first], **header)
    assert send(client, id="order-7", labels=[first])[1]["correct"]
    predict(client, images[second], **header)
    status, answer = send(client, id="order-7", labels=[second])
    assert (status, answer["predicted"], answer["replaced"]) == (200, [second], False)


def test_predictions_of_the_open_inference_protocol_are_judged_too(client, make_image) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    response = client.post("/v2/models/shapes/infer", json={"inputs": [tensor]})
    outputs = {output["name"]: output["data"] for output in response.json()["outputs"]}
    request_id = response.headers["x-request-id"]
    for index, label in enumerate(outputs["label"]):
        assert send(client, id=request_id, labels=[label], index=index)[1]["correct"]


def test_the_oldest_predictions_are_forgotten(client, make_image) -> None:
    old, (label,) = predict(client, make_image(1))
    recent = [predict(client, make_image(1))[0] for _ in range(50)]
    status, code, detail = problem(client, id=old, labels=[label])
    assert (status, code) == (404, "unknown_prediction") and "the latest 50 predictions for 168 h" in detail
    assert all(send(client, id=request_id, labels=[label])[0] == 200 for request_id in recent)


def test_invalid_feedback_is_refused_and_names_what_is_accepted(client, make_image) -> None:
    request_id, (label,) = predict(client, make_image(1))
    status, code, detail = problem(client, id=request_id, labels=["cat"])
    assert (status, code) == (422, "unknown_label") and detail == f"unknown label 'cat'; known: {', '.join(LABELS)}"
    assert problem(client, id="never", labels=[label])[:2] == (404, "unknown_prediction")
    for labels in ([], LABELS[:2]):
        assert problem(client, id=request_id, labels=labels)[:2] == (422, "invalid_request")
    for content in (
        {"id": request_id},
        {"id": request_id, "labels": label},
        {"id": request_id, "labels": [3]},
        {"id": 3, "labels": [label]},
        {"id": "", "labels": [label]},
        {"id": request_id, "labels": [label], "index": -1},
        {"id": request_id, "labels": [label], "index": True},
        {"id": request_id, "labels": [label], "label": label},
    ):
        assert problem(client, **content)[:2] == (422, "invalid_request"), content
    for body in (b"{", b"\xff", b"[" * 100_000):
        answer = client.post("/v1/feedback", content=body)
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_json")
    assert client.post("/v1/feedback", json=[1]).json()["code"] == "invalid_request"
    assert client.post("/v1/feedback").json()["code"] == "empty_body"
    assert client.post("/v1/feedback", content=b" " * (1 << 21)).json()["code"] == "body_too_large"
    assert client.get("/v1/feedback").status_code == 405
    assert send(client, id=request_id, labels=[label])[0] == 200, "a refusal changes nothing"


def test_feedback_needs_a_key_and_no_rate(bundle, serving, make_image, tmp_path) -> None:
    (tmp_path / "keys").write_text("open-sesame")
    with serving(create_app(bundle, keys=ApiKeys(tmp_path / "keys", rate=1))) as client:
        header = {"X-API-Key": "open-sesame"}
        request_id, (label,) = predict(client, make_image(1), **header)
        assert problem(client, id=request_id, labels=[label])[:2] == (401, "unauthorized")
        client.headers.update(header)
        assert [send(client, id=request_id, labels=[label])[0] for _ in range(5)] == [200] * 5


def test_a_server_that_keeps_nothing_refuses_feedback(bundle, serving, make_image) -> None:
    app = create_app(bundle, feedback_keep=0)
    with serving(app) as client:
        request_id, (label,) = predict(client, make_image(1))
        status, code, detail = problem(client, id=request_id, labels=[label])
    assert (status, code) == (404, "feedback_disabled") and "--feedback-keep 0" in detail


def test_multi_label_feedback_is_a_set_of_labels(multilabel, serving, make_image) -> None:
    with serving(create_app(multilabel)) as client:
        response = client.post("/v1/predict", content=make_image(5))
        request_id, predicted = response.headers["x-request-id"], response.json()["predictions"][0]["labels"]
        assert 0 < len(predicted) < 10
        assert send(client, id=request_id, labels=predicted[::-1])[1]["correct"] is True
        status, answer = send(client, id=request_id, labels=[])
    assert (status, answer["correct"], answer["predicted"], answer["replaced"]) == (200, False, predicted, True)


def test_the_canary_s_predictions_are_judged_as_its_own(bundle, other, serving, make_image) -> None:
    with serving(create_app(bundle, challenge=Challenge(Engine(other), 1.0, True))) as client:
        request_id, (label,) = predict(client, make_image(1))
        assert send(client, id=request_id, labels=[label])[1]["model"] == other.digest[:16]


def test_feedback_is_written_with_the_hash_of_a_captured_image(bundle, serving, make_image, tmp_path) -> None:
    sampling = DataCapture(tmp_path, fraction=1, most_bytes=1 << 20, below=1)
    with serving(create_app(bundle, sampling=sampling, feedback_log=FeedbackLog(tmp_path))) as client:
        for seed in range(2):
            request_id, (label,) = predict(client, make_image(seed))
            for _ in range(100):  # the capture writes from its own thread
                if len(list((tmp_path / "images").iterdir())) > seed:
                    break
                asyncio.run(asyncio.sleep(0.05))
            assert send(client, id=request_id, labels=[label])[0] == 200
            (file,) = tmp_path.glob("feedback-*.jsonl")
            row = json.loads(file.read_text("utf-8").splitlines()[seed])  # on disk when the response arrives
            assert row["sha256"] == hashlib.sha256(make_image(seed)).hexdigest()
            assert (tmp_path / row["image"]).read_bytes() == make_image(seed)
            wanted = {"id": request_id, "index": 0, "labels": [label], "predicted": [label], "correct": True}
            assert wanted.items() <= row.items() and row["model"] == bundle.digest[:16] and row["time"]
    assert file.stat().st_mode & 0o077 == 0, "only the owner may read it"


def test_feedback_that_cannot_be_stored_is_to_be_sent_again(bundle, serving, make_image, tmp_path) -> None:
    folder = tmp_path / "feedback"
    with serving(create_app(bundle, feedback_log=FeedbackLog(folder))) as client:
        request_id, (label,) = predict(client, make_image(1))
        folder.rmdir()
        assert problem(client, id=request_id, labels=[label])[:2] == (503, "feedback_not_stored")
        folder.mkdir()
        assert send(client, id=request_id, labels=[label])[0] == 200
    assert len(list(folder.glob("feedback-*.jsonl"))) == 1


def test_the_log_remembers_a_bounded_number_of_images(tmp_path) -> None:
    log = FeedbackLog(tmp_path)
    for number in range(MOST_IMAGES + 5):
        log.captured(str(number), 0, CapturedImage("hash", "name"))
    for number in (4, 5):
        asyncio.run(log.append(str(number), 0, {}))
    log.close()
    (file,) = tmp_path.iterdir()
    assert [json.loads(line)["sha256"] for line in file.read_text().splitlines()] == [None, "hash"]


def test_the_command_rejects_an_unusable_folder(tmp_path: Path, bundle, capsys) -> None:
    from refract.serve.cli import command

    (tmp_path / "file").write_text("")
    assert command.main([str(bundle.path), "--port", "0", "--feedback-dir", str(tmp_path / "file")]) == 2
    assert "--feedback-dir" in capsys.readouterr().err
