"""The Open Inference Protocol over gRPC, with Triton's client: the answers of HTTP, and a status for each of its errors."""

import asyncio
import contextlib
import json
import queue
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
    """A server with both protocols. port: its address; calls: the published stub; triton: the client of Triton."""
    bound = listen("127.0.0.1", 0)
    port = address(bound)
    app = create_app(served, grpc_socket=bound, **options)
    with serving(app) as http, grpc.insecure_channel(port) as channel, triton.InferenceServerClient(port) as client:
        yield SimpleNamespace(port=port, http=http, calls=GRPCInferenceServiceStub(channel), triton=client, app=app)


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
    tensor = {
        "name": "encoded",
        "datatype": "BYTES",
        "shape": [len(images)],
        "parameters": {"binary_data_size": len(lengths)},
    }
    body = json.dumps({"inputs": [tensor], "outputs": [{"name": name} for name in names]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(body))}
    answer = http.post("/v2/models/shapes/infer", content=body + lengths, headers=headers)
    assert answer.status_code == 200, answer.text
    return {row["name"]: np.array(row["data"]).reshape(row["shape"]).tolist() for row in answer.json()["outputs"]}


def test_the_messages_are_those_of_the_published_protocol() -> None:
    for name, fields in FIELDS.items():
        whole = published.DESCRIPTOR.message_types_by_name[name.partition(".")[0]]
        wanted = whole.nested_types_by_name[name.partition(".")[2]] if "." in name else whole
        descriptor = MESSAGES[name].DESCRIPTOR
        assert (descriptor.full_name, len(descriptor.fields)) == (wanted.full_name, len(fields))
        for field in descriptor.fields:
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
        assert status == grpc.StatusCode.NOT_FOUND and "is not served" in details


def test_tritons_client_receives_the_predictions_of_http(both, make_image) -> None:
    images, names = (
        [make_image(i, size=(50 + i, 40), form="PNG") for i in range(3)],
        ["probabilities", "label", "embedding"],
    )
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


def test_the_documented_client_prints_the_label(both, make_image, tmp_path, monkeypatch, capsys) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "tritonclient.grpc" in block)
    (tmp_path / "a.jpg").write_bytes(make_image(2))
    monkeypatch.chdir(tmp_path)
    exec(code.replace("localhost:8001", both.port).replace('"NAME"', '"shapes"'), {})
    (row,) = both.http.post("/v1/predict", content=make_image(2)).json()["predictions"]
    label, probability = capsys.readouterr().out.rsplit(maxsplit=1)
    assert label == row["label"] and float(probability) == pytest.approx(row["confidence"], abs=1e-6)


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
    status_code, details, trailing = refused(both.calls.ModelInfer, message)
    assert (status_code, trailing["refract-code"]) == (status, code) and says in details, details
    assert len(trailing["x-request-id"]) == 32


def test_a_message_over_the_limit_and_a_compressed_one_are_rejected(both, make_image) -> None:
    status, details, _ = refused(both.calls.ModelInfer, files(b"x" * 1_000_001))
    assert status == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details
    with pytest.raises(triton.InferenceServerException, match="UNIMPLEMENTED"):
        both.triton.infer("shapes", [encoded(make_image(1))], compression_algorithm="gzip")
    assert both.triton.infer("shapes", [encoded(make_image(1))]).as_numpy("label").shape == (1,)


shapes = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 3), max_size=5)
inputs = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["images", "encoded", "texts", "\U0001f600"]),
        "datatype": st.sampled_from(["UINT8", "BYTES", ""]),
        "shape": shapes,
    },
    optional={
        "contents": st.fixed_dictionaries(
            {"uint_contents": st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 255), max_size=13)},
            optional={"bytes_contents": st.lists(st.binary(max_size=9), max_size=6)},
        )
    },
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    tensors=st.lists(inputs, max_size=3), raw=st.lists(st.binary(max_size=13), max_size=3), rest=st.binary(max_size=9)
)
def test_no_message_causes_a_server_error(both, tensors, raw, rest: bytes) -> None:
    message = request(*tensors, raw_input_contents=raw).SerializeToString()
    with grpc.insecure_channel(both.port) as channel:
        call = channel.unary_unary(INFER)
        for content in (message, message + rest, rest):
            try:
                assert published.ModelInferResponse.FromString(call(content)).outputs
            except grpc.RpcError as error:
                assert error.code() in (BAD, grpc.StatusCode.NOT_FOUND), error.details()


def test_bytes_that_are_no_message_are_rejected(both) -> None:
    with grpc.insecure_channel(both.port) as channel:
        call = channel.unary_unary(INFER)
        assert refused(call, b"\xff\xff")[:2] == (BAD, "the request is not a message of the protocol")
        ready = channel.unary_unary("/inference.GRPCInferenceService/ModelReady")
        assert refused(ready, b"x" * 70_000)[:2] == (BAD, "the message is larger than 65536 bytes")
        unknown = channel.unary_unary("/inference.GRPCInferenceService/ModelStreamInfer")
        assert refused(unknown, b"")[0] == grpc.StatusCode.UNIMPLEMENTED


def test_messages_count_as_held_until_they_are_answered(bundle, serving, make_image) -> None:
    limits = Limits(max_held_bytes=50_000)
    with serving_grpc(serving, bundle, limits=limits) as both:
        status, details, trailing = refused(both.calls.ModelInfer, files(b"x" * 50_000))
        assert (status, trailing["refract-code"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded"), details
        assert both.calls.ModelInfer(files(make_image(1))).outputs, "the rejected message is released"


def test_no_other_process_can_take_calls_of_the_port(both) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", int(both.port.rpartition(":")[2])))


def test_a_message_of_many_fields_is_rejected_before_it_is_parsed(both) -> None:
    """Two bytes of an empty input took half a kilobyte: a message within the limit filled the memory."""
    wire = [b"\x0a\x06shapes", b"\x18\x01", b"\x19" + bytes(8), b"\x1d" + bytes(4)]  # each kind of field
    with grpc.insecure_channel(both.port) as channel:
        call = channel.unary_unary(INFER)
        for field in (b"\x2a\x00", b"\x32\x00", b"\x3a\x00"):  # an empty input, output and raw contents
            status, details, trailing = refused(call, b"".join(wire) + field * 1021)
            assert (status, trailing["refract-code"]) == (BAD, "message_too_large"), details
            assert details == "the message has too many fields: at most 1,024 are allowed"
            assert dict(refused(call, b"".join(wire) + field * 1020)[2])["refract-code"] == "invalid_request"
        assert dict(refused(call, b"\x2b" + b"\x2a\x00" * 1021 + b"\x2c")[2])["refract-code"] == "invalid_message"
        shape = request({"name": "images", "datatype": "UINT8", "shape": [1] * 100_000}).SerializeToString()
        assert "has shape [1, 1, 1" in refused(call, shape)[1]


@contextlib.contextmanager
def unsent(both) -> Iterator[tuple]:
    """Start a ModelInfer call whose message is not sent until the queue gets it. Yields (call, queue)."""
    waiting: queue.Queue = queue.Queue()
    with grpc.insecure_channel(both.port) as channel:
        call = channel.stream_unary(INFER).future(iter(waiting.get, None))
        wait_for_requests(both, 1)
        yield call, waiting
        waiting.put(None)


def test_admission_and_the_time_of_a_body_hold_before_the_message_arrives(bundle, serving, make_image) -> None:
    app = {"limits": Limits(body_seconds=1), "max_requests": 1}
    with serving_grpc(serving, bundle, **app) as both:
        with unsent(both) as (slow, messages):
            status, _, trailing = refused(both.calls.ModelInfer, files(make_image(1)))
            assert status == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (trailing["retry-after"], trailing["refract-code"]) == ("1", "overloaded")
            assert both.http.post("/v1/predict", content=make_image(1)).status_code == 429
            messages.put(files(make_image(1)).SerializeToString())
            assert slow.result(20)
        with unsent(both) as (slow, _):
            with pytest.raises(grpc.RpcError, match="the whole message did not arrive within 1 s"):
                slow.result(20)
            assert slow.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        with unsent(both) as (slow, _):
            slow.cancel()
            wait_for_requests(both, 0)
        assert both.calls.ModelInfer(files(make_image(1))).outputs
        counts = {code: outcomes(both, code) for code in ("ok", "overloaded", "body_too_slow", "client_disconnected")}
        assert counts == {"ok": 2, "overloaded": 2, "body_too_slow": 1, "client_disconnected": 1}


def wait_for_requests(both, count: int) -> None:
    """Return when the server has this number of requests in flight."""
    deadline = time.monotonic() + 20
    while both.http.get("/v1/status").json()["requests"] != count:
        assert time.monotonic() < deadline


def outcomes(both, code: str) -> float:
    return both.app.state.service.metrics.registry.get_sample_value("refract_requests_total", {"end": code})


class Held(Engine):
    """Computes when its gate is open."""

    def __init__(self, bundle) -> None:
        super().__init__(bundle)
        self.gate = threading.Event()
        self.gate.set()

    def compute(self, batch):
        assert self.gate.wait(30)
        return super().compute(batch)


def test_the_deadlines_of_server_and_client(bundle, serving, make_image) -> None:
    engine = Held(bundle)
    with serving_grpc(serving, engine, deadline_s=1) as both:
        engine.gate.clear()
        status, details, trailing = refused(both.calls.ModelInfer, files(make_image(1)))
        early = both.calls.ModelInfer.future(files(make_image(1)), timeout=0.2)
        assert early.exception().code() == grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline of the client"
        wait_for_requests(both, 0)
        assert outcomes(both, "client_disconnected") == 1
        engine.gate.set()
        assert (status, trailing["refract-code"]) == (grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_exceeded")
        assert "within 1 s" in details
        assert both.calls.ModelInfer(files(make_image(1))).outputs


def test_keys_and_their_rate(bundle, serving, make_image, tmp_path: Path, caplog) -> None:
    (tmp_path / "keys").write_text("open-sesame # ann\n")
    caplog.set_level("INFO", "refract.serve.http.access_log")
    options = {"keys": ApiKeys(tmp_path / "keys", rate=1), "access_log": True}
    with serving_grpc(serving, bundle, **options) as both:
        assert both.triton.is_server_live() and both.triton.is_server_ready() and both.triton.get_server_metadata()
        model = published.ModelMetadataRequest(name="shapes")
        for metadata in ((), (("authorization", "Bearer wrong-key"),)):
            for call, message in ((both.calls.ModelMetadata, model), (both.calls.ModelInfer, files(b"x"))):
                status, details, _ = refused(call, message, metadata=metadata)
                assert status == grpc.StatusCode.UNAUTHENTICATED and "API key" in details
        credentials = (("authorization", "Bearer open-sesame"),)
        for _ in range(3):
            assert both.calls.ModelMetadata(model, metadata=credentials).name == "shapes"
        caplog.clear()
        both.calls.ModelInfer(files(make_image(1)), metadata=(("x-api-key", "open-sesame"), ("x-request-id", "mine")))
        status, _, trailing = refused(both.calls.ModelInfer, files(make_image(1)), metadata=credentials)
        assert (status, trailing["refract-code"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limited")
        assert int(trailing["retry-after"]) >= 1
    first, second = (json.loads(line) for line in caplog.messages)
    wanted = {"id": "mine", "method": "gRPC", "path": INFER, "status": 200, "key": "ann", "model": bundle.digest[:16]}
    assert {name: first.get(name) for name in wanted} == wanted
    assert (second["status"], second["code"], second["key"]) == (429, "rate_limited", "ann")


def test_feedback_finds_the_prediction_of_a_call(bundle, serving, make_image) -> None:
    with serving_grpc(serving, bundle) as both:
        _, call = both.calls.ModelInfer.with_call(files(make_image(1)), metadata=(("x-request-id", "mine"),))
        trailing = dict(call.trailing_metadata())
        assert (trailing["x-request-id"], trailing["x-model-digest"]) == ("mine", bundle.digest[:16])
        assert trailing["server-timing"].startswith("prepare;dur=")
        feedback = {"id": "mine", "labels": ["class 1"]}
        assert both.http.post("/v1/feedback", json=feedback).status_code == 200
        assert outcomes(both, "ok") == 1


def test_swaps_under_load_lose_no_call_and_mix_no_models(bundle, other, serving, make_image, reference) -> None:
    image, stop = make_image(5), threading.Event()
    wanted = {b.digest[:16]: reference(b.classifier("cpu"), image, "multiclass") for b in (bundle, other)}
    with serving_grpc(serving, bundle) as both, ThreadPoolExecutor(4) as pool:

        def ask(_: int) -> set[str]:
            versions = set()
            while not stop.is_set():
                result = both.triton.infer("shapes", [encoded(image)])
                versions.add(version := result.get_response().model_version)
                np.testing.assert_allclose(result.as_numpy("probabilities")[0], wanted[version], atol=1e-5)
            return versions

        asking = [pool.submit(ask, i) for i in range(4)]
        try:
            engines, models = [Engine(other), Engine(bundle)], both.app.state.service.models
            for turn in range(20):
                swap = models.swap(engines[turn % 2])
                asyncio.run_coroutine_threadsafe(swap, models.champion._loop).result(30)
        finally:
            stop.set()
        assert set.union(*(future.result() for future in asking)) == set(wanted)
        status, details, _ = refused(both.calls.ModelInfer, files(image, model_version=other.digest[:16]))
        assert status == grpc.StatusCode.NOT_FOUND and bundle.digest[:16] in details
