"""Parse ModelInferRequest messages. The values travel on in the form of the HTTP protocol's JSON document: one parser checks both."""

from typing import Any

from google.protobuf.message import DecodeError

from refract.models.bundle.bundle import Bundle
from refract.serve.errors import RequestError
from refract.serve.grpc.messages import MESSAGES
from refract.serve.requests.decoding import ParsedRequest
from refract.serve.requests.infer_parsing import read_document
from refract.serve.requests.limits import Limits
from refract.serve.requests.model_name import check_model
from refract.serve.requests.parsing import SPARE

MOST_DIMENSIONS = 16
"""Dimensions of a shape that are read. The errors show the first ones, and no input has more than four."""


def parsed(name: str, content: bytes) -> Any:
    """Return the message `name` with these bytes. RequestError 400 for others."""
    try:
        return MESSAGES[name].FromString(content)
    except DecodeError as err:
        raise RequestError(400, "invalid_message", "the request is not a message of the protocol") from err


def read_message(content: bytes, served: Bundle, limits: Limits) -> ParsedRequest:
    """Parse a ModelInferRequest. RequestError 4xx, 404 unless it names the model `served` and its version or none."""
    _check_fields(content)
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


def _check_fields(content: bytes) -> None:
    """Raise RequestError 413 for more than SPARE fields, before parsing: an input of two bytes takes hundreds in memory.

    Fields of nested messages do not count. RequestError 400 for a group, whose end only the parser would find: the protocol has none.
    """
    position = count = 0
    while position < len(content):
        count += 1
        if count > SPARE:
            raise RequestError(
                413, "message_too_large", f"the message has too many fields: at most {SPARE:,} are allowed"
            )
        tag, position = _varint(content, position)
        kind = tag & 7
        if kind not in _SIZES:
            raise RequestError(400, "invalid_message", "the request is not a message of the protocol")
        size = _SIZES[kind]
        if size is None:
            number, position = _varint(content, position)
            size = number if kind == _WITH_LENGTH else 0
        position += size


_WITH_LENGTH = 2
_SIZES = {0: None, 1: 8, _WITH_LENGTH: None, 5: 4}
"""Kind of a field on the wire → bytes of its value; None for a number of variable size, the value itself or its length."""


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """Return (number, position after it). A number at the end may be incomplete: the parser rejects it."""
    number = shift = 0
    for byte in content[position : position + 10]:
        number |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            break
    return number, position


def _input(tensor: Any, size: int | None, most: int) -> dict[str, Any]:
    """Return the JSON form of an input tensor. size: bytes of its raw contents, None without; most: elements of BYTES that are copied."""
    described = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape[:MOST_DIMENSIONS])}
    if size is not None:
        return described | {"parameters": {"binary_data_size": size}}
    contents = tensor.contents
    data = contents.bytes_contents[:most] if tensor.datatype == "BYTES" else list(contents.uint_contents)
    return described | {"data": data}
