"""The Open Inference Protocol, with Triton's client and with plain HTTP."""

import base64
import json

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refract.augment.decoding.decode import decode
from refract.serve.http.app import create_app
from refract.serve.requests.limits import Limits


@pytest.fixture(scope="module")
def client(bundle, serving):
    with serving(
        create_app(bundle, limits=Limits(max_images=4, max_pixels=100_000, max_total_pixels=200_000))
    ) as client:
        yield client


@pytest.fixture(scope="module")
def tritons(client):
    with triton.InferenceServerClient(f"{client.base_url.host}:{client.base_url.port}") as triton_client:
        yield triton_client


def plain(client, data: bytes) -> dict[str, float]:
    (prediction,) = client.post("/v1/predict?top=10", content=data).json()["predictions"]
    return {entry["label"]: entry["confidence"] for entry in prediction["top"]}


def test_tritons_client_reads_the_metadata(tritons, bundle) -> None:
    assert tritons.is_server_live() and tritons.is_server_ready() and tritons.is_model_ready("shapes")
    assert tritons.get_server_metadata()["name"] == "refract"
    model = tritons.get_model_metadata("shapes")
    assert model["versions"] == [bundle.digest[:16]] and model["labels"] == list(bundle.info.labels)
    assert {row["name"]: row["datatype"] for row in model["inputs"]} == {"images": "UINT8", "encoded": "BYTES"}
    with pytest.raises(triton.InferenceServerException):
        tritons.infer(
            "other", [triton.InferInput("encoded", [1], "BYTES").set_data_from_numpy(np.array([b"x"], object))]
        )


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_receives_the_predictions_of_v1(tritons, client, make_image, binary: bool) -> None:
    images = [make_image(i, size=(50 + i, 40), form="PNG") for i in range(3)]
    wanted = [plain(client, data) for data in images]
    given = images if binary else [base64.b64encode(data) for data in images]
    encoded = triton.InferInput("encoded", [3], "BYTES")
    encoded.set_data_from_numpy(np.array(given, dtype=object), binary_data=binary)
    tensor = triton.InferInput("images", [1, 40, 50, 3], "UINT8")
    tensor.set_data_from_numpy(decode(images[0])[None], binary_data=binary)
    for inputs, rows in (([encoded], wanted), ([tensor], wanted[:1])):
        result = tritons.infer("shapes", inputs, request_id="7")
        assert result.get_response()["id"] == "7"
        for probabilities, label, row in zip(
            result.as_numpy("probabilities"), result.as_numpy("label"), rows, strict=True
        ):
            assert dict(zip(sorted(row), probabilities, strict=True)) == pytest.approx(row, abs=1e-6)
            assert max(row, key=row.__getitem__) == (label.decode() if isinstance(label, bytes) else label)
    only = tritons.infer("shapes", [tensor], outputs=[triton.InferRequestedOutput("label")])
    assert only.as_numpy("probabilities") is None and only.as_numpy("label").shape == (1,)


def infer(client, inputs, *, binary: bytes = b"", announced: str | None = None):
    body = json.dumps({"inputs": inputs}).encode()
    headers = (
        {} if announced is None else {"Inference-Header-Content-Length": announced.replace("LENGTH", str(len(body)))}
    )
    return client.post("/v2/models/shapes/infer", content=body + binary, headers=headers)


@pytest.mark.parametrize(
    ("inputs", "status", "says"),
    [
        ([], 422, "one tensor"),
        ([{"name": "images", "datatype": "FP32", "shape": [1, 2, 2, 3], "data": [0] * 12}], 422, "one tensor"),
        (
            [{"name": "images", "datatype": "UINT8", "shape": [1, 2, 2, 4], "data": [0] * 16}],
            422,
            "expected [N, height",
        ),
        ([{"name": "images", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [0] * 11}], 422, "11 values"),
        ([{"name": "images", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [256] * 12}], 422, "0 … 255"),
        (
            [{"name": "images", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [[1], [1, 2]]}],
            422,
            "different lengths",
        ),
        ([{"name": "images", "datatype": "UINT8", "shape": [5, 2, 2, 3], "data": []}], 413, "at most 4"),
        ([{"name": "images", "datatype": "UINT8", "shape": [1, 10**9, 10**9, 3], "data": []}], 413, "too large"),
        ([{"name": "encoded", "datatype": "BYTES", "shape": [2], "data": ["aaaa"]}], 422, "1 elements"),
        ([{"name": "encoded", "datatype": "BYTES", "shape": [1], "data": ["!"]}], 400, "base64"),
        ([{"name": "encoded", "datatype": "BYTES", "shape": [1], "data": ["aGVsbG8="]}], 400, "image 0"),
        ([{"name": "encoded", "datatype": "BYTES", "shape": [5], "data": [""] * 5}], 413, "more than 4"),
    ],
)
def test_the_error_states_the_reason(client, inputs, status: int, says: str) -> None:
    answer = infer(client, inputs)
    assert answer.status_code == status and says in answer.json()["detail"], answer.text


def test_incomplete_binary_tensors(client) -> None:
    def encoded(size: int) -> list[dict]:
        return [{"name": "encoded", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}}]

    for size, binary in ((4, b"\xff\xff\xff\xff"), (9, b"\x01\0\0\0a"), (3, b"abc"), (0, b"")):
        answer = infer(client, encoded(size), binary=binary, announced="LENGTH")
        assert answer.status_code == 422, (size, binary, answer.text)
    assert infer(client, encoded(5), binary=b"\x01\0\0\0a", announced="LENGTH").json()["detail"].startswith("image 0")
    for announced in ("99999", "-1", "1e1", "9" * 5_000, ""):
        refused = infer(client, [], announced=announced)
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("inputs", "binary", "says"),
    [
        ({"name": "encoded", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}}, b"\1\0\0\0ab", "6 bytes"),
        ({"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "parameters": {"binary_data_size": 3}}, b"abcd", "4 bytes"),
        ({"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}, b"a", "1 bytes"),
        ({"name": "encoded", "datatype": "BYTES", "shape": [1], "data": ["aaaa"]}, b"a", "1 bytes"),
        ({"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "parameters": {"binary_data_size": -3}}, b"abc", "whole number"),
        ({"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "parameters": {"binary_data_size": "3"}}, b"abc", "whole number"),
        ({"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [True, False, True]}, b"", "booleans"),
        ({"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, True]}, b"", "booleans"),
        ({"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [[[[1, False, 3]]]]}, b"", "booleans"),
    ],
)  # fmt: skip
def test_surplus_bytes_and_booleans_are_rejected(client, inputs, binary: bytes, says: str) -> None:
    answer = infer(client, [inputs], binary=binary, announced="LENGTH")
    assert (
        answer.status_code == 400 and answer.json()["code"] == "invalid_request" and says in answer.json()["detail"]
    ), answer.text


def test_statistics_count_answered_requests(bundle, serving, make_image) -> None:
    def image(count: int) -> list[triton.InferInput]:
        return [
            triton.InferInput("images", [count, 8, 8, 3], "UINT8").set_data_from_numpy(
                np.zeros((count, 8, 8, 3), np.uint8)
            )
        ]

    with (
        serving(create_app(bundle)) as client,
        triton.InferenceServerClient(f"{client.base_url.host}:{client.base_url.port}") as tritons,
    ):
        version = bundle.digest[:16]
        (fresh,) = tritons.get_inference_statistics("shapes", version)["model_stats"]
        assert (
            fresh["inference_count"] == fresh["execution_count"] == fresh["last_inference"] == 0
            and fresh["batch_stats"] == []
        )
        for count in (1, 1, 3):
            tritons.infer("shapes", image(count))
        client.post("/v1/predict?tta=flip", content=make_image(1))
        for bad in (b"not an image", b"\xff\xd8\xff\xe0" + b"x" * 20_000):
            assert client.post("/v1/predict", content=bad).status_code == 400
        (statistics,) = tritons.get_inference_statistics()["model_stats"]
        assert (
            client.get("/v2/models/other/stats").status_code
            == client.get("/v2/models/shapes/versions/1/stats").status_code
            == 404
        )
        assert "statistics" in tritons.get_server_metadata()["extensions"]
    assert (statistics["name"], statistics["version"]) == ("shapes", version)
    assert (
        statistics["inference_count"] == 6
        and statistics["execution_count"] == 4
        and statistics["last_inference"] > 1.7e12
    )
    stats = statistics["inference_stats"]
    assert stats["success"]["count"] == 4 and stats["fail"]["count"] == 2 and stats["fail"]["ns"] > 0
    parts = [stats[name] for name in ("compute_input", "queue", "compute_infer", "compute_output")]
    assert [part["count"] for part in parts] == [4] * 4
    assert sum(part["ns"] for part in parts) == pytest.approx(stats["success"]["ns"], rel=1e-6)
    batches = {batch["batch_size"]: batch["compute_infer"] for batch in statistics["batch_stats"]}
    assert {size: duration["count"] for size, duration in batches.items()} == {1: 2, 2: 1, 3: 1} and all(
        duration["ns"] for duration in batches.values()
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "data", "parameters"]), inner),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["images", "encoded"]),
    kind=st.sampled_from(["UINT8", "BYTES"]),
    shape=values,
    data=values,
    more=values,
)
def test_no_document_causes_a_server_error(client, name, kind, shape, data, more) -> None:
    inputs = [{"name": name, "datatype": kind, "shape": shape, "data": data, "parameters": more}]
    assert infer(client, inputs).status_code in (200, 400, 413, 422)
    assert infer(client, more).status_code in (400, 413, 422)
    good = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
    body = json.dumps({"inputs": [good], "outputs": shape, "id": data})
    assert client.post("/v2/models/shapes/infer", content=body).status_code in (200, 422)


def test_the_requested_version_answers(client, bundle) -> None:
    good = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
    (version,) = client.get("/v2/models/shapes").json()["versions"]
    for path in ("", f"/versions/{version}"):
        assert client.get(f"/v2/models/shapes{path}/ready").status_code == 200
        assert client.get(f"/v2/models/shapes{path}").json()["versions"] == [version]
        assert client.post(f"/v2/models/shapes{path}/infer", json={"inputs": [good]}).status_code == 200
    assert client.get("/v2/models/shapes/versions/1/ready").status_code == 404
    body = {"inputs": [good], "outputs": [{"name": "x"}]}
    assert client.post("/v2/models/shapes/infer", json=body).status_code == 422
    for odd in (5, None, ["label"]):
        body = {"inputs": [good], "outputs": [{"name": odd}]}
        assert client.post("/v2/models/shapes/infer", json=body).status_code == 422
    body = {"inputs": [good], "outputs": [{"name": "label"}]}
    outputs = client.post("/v2/models/shapes/infer", json=body).json()["outputs"]
    assert [output["name"] for output in outputs] == ["label"]
