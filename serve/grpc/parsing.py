"""Parse ModelInferRequest messages. The values travel on in the form of the HTTP protocol's JSON document: one parser checks both."""

from typing import Any

from google.protobuf.message import DecodeError

from refract.models.bundle.bundle import Bundle
from refract.serve.grpc.messages import MESSAGES
from refract.serve.http.errors import RequestError
from refract.serve.requests.decoding import ParsedRequest
from refract.serve.requests.infer_parsing import read_document
from refract.serve.requests.limits import Limits
from refract.serve.requests.model_name import check_model


def parsed(name: str, content: bytes) -> Any:
    """Return the message `name` with these bytes. RequestError 400 for others."""
    try:
        return MESSAGES[name].FromString(content)
    except DecodeError as err:
        raise RequestError(400, "invalid_message", "the request is not a message of the protocol") from err


def read_message(content: bytes, served: Bundle, limits: Limits) -> ParsedRequest:
    """Parse a ModelInferRequest. RequestError 4xx, 404 unless it names the model `served` and its version or none."""
    message = parsed("ModelInferRequest", content)
    check_model(served, message.model_name, message.model_version or None)
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        problem = f"`raw_input_contents` has {len(raw)} elements for {len(message.inputs)} inputs; send one for each"
        raise RequestError(400, "invalid_request", problem)
    if raw and any(tensor.HasField("contents") for tensor in message.inputs):
        problem = "an input has both `contents` and `raw_input_contents`; send one of them"
        raise RequestError(400, "invalid_request", problem)
    inputs = [
        _input(tensor, len(raw[row]) if raw else None, limits.max_images + 1)
        for row, tensor in enumerate(message.inputs)
    ]
    outputs = [output.name for output in message.outputs]
    document = {"inputs": inputs, "outputs": outputs, "id": message.id or None}
    request = read_document(document, b"".join(raw), limits)
    return request._replace(version=message.model_version or None)


def _input(tensor: Any, size: int | None, most: int) -> dict[str, Any]:
    """Return the JSON form of an input tensor. size: bytes of its raw contents, None without; most: elements of BYTES that are copied."""
    described = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    if size is not None:
        return described | {"parameters": {"binary_data_size": size}}
    contents = tensor.contents
    data = contents.bytes_contents[:most] if tensor.datatype == "BYTES" else list(contents.uint_contents)
    return described | {"data": data}
