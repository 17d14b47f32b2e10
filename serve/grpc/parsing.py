"""Parse ModelInferRequest messages. The values travel on in the form of the HTTP protocol's JSON document: one parser checks both."""

from typing import Any

from google.protobuf.message import DecodeError

from refract.serve.grpc.messages import MESSAGES
from refract.serve.http.errors import RequestError
from refract.serve.requests.decoding import ParsedRequest
from refract.serve.requests.infer_parsing import read_document
from refract.serve.requests.limits import Limits


def parsed(name: str, content: bytes) -> Any:
    """Return the message `name` with these bytes. RequestError 400 for others."""
    try:
        return MESSAGES[name].FromString(content)
    except DecodeError as err:
        raise RequestError(400, "invalid_message", "the request is not a message of the protocol") from err


def read_message(content: bytes, limits: Limits) -> ParsedRequest:
    """Parse a ModelInferRequest. RequestError 4xx."""
    message = parsed("ModelInferRequest", content)
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        problem = f"`raw_input_contents` has {len(raw)} elements for {len(message.inputs)} inputs; send one for each"
        raise RequestError(400, "invalid_request", problem)
    if raw and any(tensor.HasField("contents") for tensor in message.inputs):
        problem = "an input has both `contents` and `raw_input_contents`; send one of them"
        raise RequestError(400, "invalid_request", problem)
    inputs = [_input(tensor, len(raw[row]) if raw else None) for row, tensor in enumerate(message.inputs)]
    outputs = [output.name for output in message.outputs]
    document = {"inputs": inputs, "outputs": outputs, "id": message.id or None}
    return read_document(document, b"".join(raw), limits)


def _input(tensor: Any, size: int | None) -> dict[str, Any]:
    """Return the JSON form of an input tensor. size: the bytes of its raw contents, None without."""
    described = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    if size is not None:
        return described | {"parameters": {"binary_data_size": size}}
    contents = tensor.contents
    return described | {"data": list(contents.bytes_contents if tensor.datatype == "BYTES" else contents.uint_contents)}
