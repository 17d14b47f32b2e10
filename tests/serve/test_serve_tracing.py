"""Traces that a collector on a real port receives."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tritonclient.grpc import InferenceServerClient, InferenceServerException, InferInput

from refract.serve.http.app import create_app
from refract.serve.http.tracing import provider
from refract.serve.http.transport.server import address, listen

PARENT = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def collector():
    """(the address of the collector, the received spans)"""
    spans = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            spans.extend(s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()


def test_a_request_is_a_child_span_of_its_client_with_its_stages(bundle, serving, make_image, collector) -> None:
    address, spans = collector
    with serving(create_app(bundle, traces=provider(address))) as client:
        headers = {"traceparent": f"00-{PARENT}-b7ad6b7169203331-01", "X-Request-Id": "mine"}
        assert client.post("/v1/predict", content=make_image(1), headers=headers).status_code == 200
        assert client.post("/v1/predict", content=b"no image").status_code == 400
    first, second = (span for span in spans if span.name == "POST /v1/predict")
    assert first.trace_id.hex() == PARENT and first.parent_span_id.hex() == "b7ad6b7169203331"
    facts = {item.key: item.value.string_value or item.value.int_value for item in first.attributes}
    assert facts["http.response.status_code"] == 200 and facts["refract.request_id"] == "mine"
    stages = [span for span in spans if span.parent_span_id == first.span_id]
    assert [span.name for span in stages] == ["prepare", "queue", "compute"]
    ends = [first.start_time_unix_nano]
    for span in stages:
        assert span.start_time_unix_nano >= ends[-1] - 10**6 and span.end_time_unix_nano >= span.start_time_unix_nano
        ends.append(span.end_time_unix_nano)
    assert first.end_time_unix_nano >= ends[-1] - 10**6
    assert second.trace_id != first.trace_id and not [s for s in spans if s.parent_span_id == second.span_id]


def test_a_call_over_grpc_is_a_span_with_its_stages(bundle, serving, make_image, collector) -> None:
    endpoint, spans = collector
    bound = listen("127.0.0.1", 0)
    port, image = address(bound), np.array([make_image(1)], dtype=object)
    with (
        serving(create_app(bundle, traces=provider(endpoint), grpc_socket=bound)),
        InferenceServerClient(port) as client,
    ):
        inputs = [InferInput("encoded", [1], "BYTES").set_data_from_numpy(image)]
        headers = {"traceparent": f"00-{PARENT}-b7ad6b7169203331-01", "x-request-id": "mine"}
        client.infer("shapes", inputs, headers=headers)
        with pytest.raises(InferenceServerException):
            client.infer("other", inputs)
    first, second = (span for span in spans if span.name == "inference.GRPCInferenceService/ModelInfer")
    assert first.trace_id.hex() == PARENT and first.parent_span_id.hex() == "b7ad6b7169203331"
    facts = {item.key: item.value.string_value or item.value.int_value for item in first.attributes}
    assert (facts["rpc.system"], facts["rpc.grpc.status_code"], facts["refract.request_id"]) == ("grpc", 0, "mine")
    stages = [span for span in spans if span.parent_span_id == first.span_id]
    assert [span.name for span in stages] == ["prepare", "queue", "compute"]
    assert {item.key: item.value.int_value for item in second.attributes}["rpc.grpc.status_code"] == 5  # NOT_FOUND


def test_an_unreachable_collector_does_no_harm(bundle, serving, make_image, monkeypatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with serving(create_app(bundle, traces=provider("http://127.0.0.1:9/v1/traces"))) as client:
        assert client.post("/v1/predict", content=make_image(1)).status_code == 200
