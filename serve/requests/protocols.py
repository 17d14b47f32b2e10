"""The bodies of `/v1/predict` and of the Open Inference Protocol over HTTP and gRPC, and how each is parsed."""

from typing import NamedTuple

from refract.models.bundle.bundle import Bundle
from refract.serve.requests.decoding import ParsedRequest, read
from refract.serve.requests.infer_parsing import read_infer
from refract.serve.requests.limits import Limits


class PredictBody(NamedTuple):
    """The body of a `/v1/predict` request. content_type: the header field as received."""

    content: bytes
    content_type: str


class InferBody(NamedTuple):
    """The body of an inference request of the Open Inference Protocol. json_length: the header field with the length of its JSON document,
    None without one."""

    content: bytes
    json_length: str | None


class InferMessage(NamedTuple):
    """A ModelInferRequest of the Open Inference Protocol over gRPC, as received. served: the bundle whose name and version it must have."""

    content: bytes
    served: Bundle


Body = PredictBody | InferBody | InferMessage


def parse(body: Body, limits: Limits) -> ParsedRequest:
    """Parse a body. RequestError 4xx."""
    if isinstance(body, InferMessage):
        from refract.serve.grpc.parsing import read_message  # needs the extra `grpc`

        return read_message(body.content, body.served, limits)
    if isinstance(body, InferBody):
        return read_infer(body.content, body.json_length, limits)
    return ParsedRequest(read(body.content_type, body.content, limits))
