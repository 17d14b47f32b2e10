"""The Open Inference Protocol over gRPC, with Triton's client: the answers of HTTP, and a status for each of its errors."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as published
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from refract.augment.decoding.decode import decode
from refract.serve.grpc.messages import FIELDS, MESSAGES
from refract.serve.http.app import create_app
from refract.serve.http.auth import ApiKeys
from refract.serve.http.transport.server import address, listen
from refract.serve.requests.limits import Limits
from refract.serve.runtime.engine import Engine

INFER = "/inference.GRPCInferenceService/ModelInfer"


@contextlib.contextmanager
def serving_grpc(serving, served, **options) -> Iterator[SimpleNamespace]:
    """A server with both protocols. http: its HTTP client; calls: the published stub; triton: Triton's client; app: the application."""
    bound = listen("127.0.0.1", 0)
    port = address(bound)
    app = create_app(served, grpc_socket=bound, **options)
    with serving(app) as http, grpc.insecure_channel(port) as channel, triton.InferenceServerClient(port) as client:
        yield SimpleNamespace(http=http, calls=GRPCInferenceServiceStub(channel), triton=client, app=app)


@pytest.fixture(scope="module")
def both(bundle, serving):
    limits = Limits(max_body_bytes=1_000_000, max_images=4, max_pixels=100_000, max_total_pixels=200_000)
    with serving_grpc(serving, bundle, limits=limits) as both:
        yield both


def encoded(*images: bytes) -> triton.InferInput:
    return triton.InferInput("encoded", [len(images)], "BYTES").set_data_from_numpy(np.array(images, dtype=object))


def request(*inputs: dict, model: str = "shapes", **fields) -> published.ModelInferRequest:
    return published.ModelInferRequest(model_name=model, inputs=inputs, **fields)


def files(*images: bytes, **fields) -> published.ModelInferRequest:
    tensor = {"name": "encoded", "datatype": "BYTES", "shape": [len(images)], "contents": {"bytes_contents": images}}
    return request(tensor, **fields)


def refused(call, message, **options) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """(status, details, trailing metadata) of a call that fails"""
    with pytest.raises(grpc.RpcError) as failure:
        call(message, **options)
    error = failure.value
    return error.code(), error.details(), dict(error.trailing_metadata() or ())


def of_http(http: httpx.Client, images: list[bytes], names: list[str]) -> dict[str, list]:
    """The outputs of HTTP by name."""
    lengths = b"".join(len(image).to_bytes(4, "little") + image for image in images)
    tensor = {"name": "encoded", "datatype": "BYTES", "shape": [len(images)], "parameters": {"binary_data_size": len(lengths)}}
    body = json.dumps({"inputs": [tensor], "outputs": [{"name": name} for name in names]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(body))}
    answer = http.post("/v2/models/shapes/infer", content=body + lengths, headers=headers)
    assert answer.status_code == 200, answer.text
    return {row["name"]: np.array(row["data"]).reshape(row["shape"]).tolist() for row in answer.json()["outputs"]}


def test_the_messages_are_those_of_the_published_protocol() -> None:
    for name, fields in FIELDS.items():
        whole = published.DESCRIPTOR.message_types_by_name[name.partition(".")[0]]
        wanted = whole.nested_types_by_name[name.partition(".")[2]] if "." in name else whole
        own = MESSAGES[name].DESCRIPTOR
        assert (own.full_name, len(own.fields)) == (wanted.full_name, len(fields))
        for field in own.fields:
            other = wanted.fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated), field
            assert field.message_type is None or field.message_type.full_name == other.message_type.full_name


def test_metadata_and_health_are_those_of_http(both, bundle) -> None:
    assert both.triton.is_server_live() and both.triton.is_server_ready() and both.triton.is_model_ready("shapes")
    server, wanted = both.triton.get_server_metadata(), both.http.get("/v2").json()
    assert (server.name, server.version) == (wanted["name"], wanted["version"])
    model, wanted = both.triton.get_model_metadata("shapes", as_json=True), both.http.get("/v2/models/shapes").json()
    assert (model["name"], model["versions"], model["platform"]) == ("shapes", [bundle.digest[:16]], "refract")
    for part in ("inputs", "outputs"):
        rows = [{**row, "shape": list(map(int, row["shape"]))} for row in model[part]]
        assert rows == wanted[part]
    version = bundle.digest[:16]
    assert both.triton.is_model_ready("shapes", version)
    for name, other in (("other", ""), ("shapes", "1")):
        status, details, _ = refused(both.calls.ModelReady, published.ModelReadyRequest(name=name, version=other))
        assert status == grpc.StatusCode.NOT_FOUND and "is not served" in details or "served version" in details


def test_tritons_client_receives_the_predictions_of_http(both, make_image) -> None:
    images, names = [make_image(i, size=(50 + i, 40), form="PNG") for i in range(3)], ["probabilities", "label", "embedding"]
    wanted = of_http(both.http, images, names)
    pixels = triton.InferInput("images", [1, 40, 50, 3], "UINT8").set_data_from_numpy(decode(images[0])[None])
    outputs = list(map(triton.InferRequestedOutput, names))
    for tensor, count in ((encoded(*images), 3), (pixels, 1)):
        result = both.triton.infer("shapes", [tensor], outputs=outputs, request_id="7")
        response = result.get_response()
        assert (response.id, response.model_name, len(response.model_version)) == ("7", "shapes", 16)
        assert [output.name for output in response.outputs] == names
        for name in ("probabilities", "embedding"):
            np.testing.assert_allclose(result.as_numpy(name), wanted[name][:count], atol=1e-6)
        assert [label.decode() for label in result.as_numpy("label")] == wanted["label"][:count]
    usual = both.triton.infer("shapes", [pixels])
    assert [output.name for output in usual.get_response().outputs] == ["probabilities", "label"]


def test_typed_contents_are_read_like_raw_ones(both, make_image) -> None:
    image = make_image(1, form="PNG")
    pixels = decode(image)
    shape = [1, *pixels.shape]
    tensor = {"name": "images", "datatype": "UINT8", "shape": shape}
    contents = {"uint_contents": pixels.ravel().tolist()}
    messages = [
        files(image),
        request({**tensor, "contents": contents}),
        request(tensor, raw_input_contents=[pixels.tobytes()]),
        files(image, parameters={"priority": {"int64_param": 1}}),  # a field that the server skips
    ]
    answers = [both.calls.ModelInfer(message).raw_output_contents for message in messages]
    assert all(list(answer) == list(answers[0]) for answer in answers)


BAD = grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("message", "status", "code", "says"),
    [
        (files(b"x", model="other"), grpc.StatusCode.NOT_FOUND, "unknown_model", "serves 'shapes'"),
        (files(b"x", model_version="1"), grpc.StatusCode.NOT_FOUND, "unknown_model", "served version"),
        (files(b"no image"), BAD, "invalid_image", "image 0"),
        (files(), BAD, "invalid_request", "at least one file"),
        (files(*[b"x"] * 5), BAD, "too_many_images", "more than 4"),
        (request(), BAD, "invalid_request", "one tensor"),
        (request({"name": "images", "datatype": "FP32", "shape": [1, 1, 1, 3]}), BAD, "invalid_request", "one tensor"),
        (
            request({"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "contents": {"uint_contents": [1, 2, 256]}}),
            BAD, "invalid_request", "0 … 255",
        ),
        (
            request({"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3]}, raw_input_contents=[b"ab"]),
            BAD, "invalid_request", "2 values",
        ),
        (request({"name": "images", "datatype": "UINT8", "shape": [1, 999, 999, 3]}), BAD, "images_too_large", "too large"),
        (files(b"x", raw_input_contents=[b"x"]), BAD, "invalid_request", "both `contents`"),
        (files(b"x", raw_input_contents=[b"x", b"y"]), BAD, "invalid_request", "2 elements for 1 inputs"),
        (files(b"x", outputs=[{"name": "odd"}]), BAD, "invalid_request", "unknown output"),
    ],
)  # fmt: skip
def test_an_error_has_the_code_and_the_message_of_http(both, message, status, code: str, says: str) -> None:
    found, details, trailing = refused(both.calls.ModelInfer, message)
    assert (found, trailing["refract-code"]) == (status, code) and says in details, details
    assert len(trailing["x-request-id"]) == 32


def test_a_message_over_the_limit_and_a_compressed_one_are_rejected(both, make_image) -> None:
    status, details, _ = refused(both.calls.ModelInfer, files(b"x" * 1_000_001))
    assert status == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details
    with pytest.raises(triton.InferenceServerException, match="UNIMPLEMENTED"):
        both.triton.infer("shapes", [encoded(make_image(1))], compression_algorithm="gzip")
    assert both.triton.infer("shapes", [encoded(make_image(1))]).as_numpy("label").shape == (1,)


def test_bytes_that_are_no_message_are_rejected(both) -> None:
    with grpc.insecure_channel(both.triton._channel._channel.target().decode()) as channel:
        call = channel.unary_unary(INFER)
        assert refused(call, b"\xff\xff")[:2] == (BAD, "the request is not a message of the protocol")
        unknown = channel.unary_unary("/inference.GRPCInferenceService/ModelStreamInfer")
        assert refused(unknown, b"")[0] == grpc.StatusCode.UNIMPLEMENTED
