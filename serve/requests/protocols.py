"""The bodies of the two protocols, `/v1/predict` and the Open Inference Protocol, and how each is parsed."""

from typing import NamedTuple

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


def parse(body: PredictBody | InferBody, limits: Limits) -> ParsedRequest:
    """Parse a body. RequestError 4xx."""
    if isinstance(body, InferBody):
        return read_infer(body.content, body.json_length, limits)
    return ParsedRequest(read(body.content_type, body.content, limits))
