"""Parse inference requests of the Open Inference Protocol, version 2. Their routes: `refract.serve.http.routes.v2`."""

import math
import struct
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np

from refract.serve.errors import RequestError
from refract.serve.requests.decoding import EACH, ParsedRequest, RequestImages, encoded_images, numbered
from refract.serve.requests.limits import Limits
from refract.serve.requests.parsing import SPARE, from_base64, parsed

RESIZE_COST = 0.1
"""The cost of a pixel that is only resized, as a fraction of the cost of one that is also decoded."""

HEADER = "inference-header-content-length"
"""The header field with the length of the JSON document, if binary tensors follow it."""

OUTPUTS = ("probabilities", "label")
"""The outputs of a request that names none."""

OPTIONAL_OUTPUTS = ("embedding", "familiarity")
"""The outputs that a request must name."""

DATATYPES = {"images": "UINT8", "encoded": "BYTES", "texts": "BYTES"}
"""The inputs and their types."""

EXPECTED = (
    "`inputs` must be one tensor of images, `images`, UINT8 [N, height, width, 3], or `encoded`, BYTES [N], "
    "and for a model that reads texts `texts`, BYTES [N]"
)


def read_infer(body: bytes, json_length: str | None, limits: Limits) -> ParsedRequest:
    """Parse the body of an HTTP request. json_length: the value of HEADER, None without one. RequestError 4xx."""
    return read_document(*_parts(body, json_length, limits), limits)


def read_document(document: dict[str, Any], binary: bytes, limits: Limits) -> ParsedRequest:
    """Parse a request in the form of its JSON document; over gRPC elements of type BYTES are bytes. binary: the binary tensors after it.
    RequestError 4xx."""
    outputs, number = _outputs(document.get("outputs")), document.get("id")
    samples = _samples(_inputs(document.get("inputs"), binary), limits)
    return ParsedRequest(samples, outputs, number if isinstance(number, str) else None)


def _outputs(requested: Any) -> tuple[str, ...]:
    """Return the names of the requested outputs; OUTPUTS if the request names none."""
    if not isinstance(requested, list | None):
        raise _invalid("`outputs` must be a list")
    names = [row.get("name") if isinstance(row, dict) else row for row in requested or []]
    known = OUTPUTS + OPTIONAL_OUTPUTS
    if unknown := [name for name in names if name not in known]:
        raise _invalid(f"unknown output {str(unknown[0])[:40]!r}; known: {', '.join(f'`{name}`' for name in known)}")
    return tuple(name for name in known if name in names) or OUTPUTS


def _parts(body: bytes, json_length: str | None, limits: Limits) -> tuple[dict[str, Any], bytes]:
    """Return (the JSON document, the binary tensors after it)."""
    if json_length is not None and not _within(json_length, len(body)):
        raise RequestError(400, "invalid_request", f"{HEADER} is not the length of the JSON part of the body")
    length = len(body) if json_length is None else int(json_length)
    document = parsed(body[:length], objects=SPARE, values=3 * limits.max_total_pixels + SPARE)
    if not isinstance(document, dict):
        raise RequestError(422, "invalid_request", "the body must be a JSON object with `inputs`")
    return document, body[length:]


def _within(text: str, maximum: int) -> bool:
    """Whether `text` is a whole number of at most `maximum`. `int` raises ValueError for thousands of digits."""
    return text.isdecimal() and len(text) < 20 and int(text) <= maximum


class _Input(NamedTuple):
    """An input tensor. data: its values in the JSON document; raw: its binary values, None without."""

    shape: list[Any]
    data: Any
    raw: bytes | None


def _inputs(inputs: Any, binary: bytes) -> dict[str, _Input]:
    """Return the input tensors by name. RequestError unless they have the names and types of DATATYPES, and the sizes of `binary`."""
    tensors = [_named(tensor) for tensor in inputs] if isinstance(inputs, list) else []
    names = [name for name, _ in tensors]
    if not names or len(names) > len(set(names)) or {"images", "encoded"} <= set(names):
        raise _invalid(EXPECTED)
    sizes = [_binary_size(tensor) for _, tensor in tensors]
    total = sum(size or 0 for size in sizes)
    if len(binary) != total:
        message = f"{len(binary)} bytes follow the JSON document, but `binary_data_size` is {total}"
        raise RequestError(400 if len(binary) > total else 422, "invalid_request", message)
    ends = accumulate(size or 0 for size in sizes)
    return {
        name: _Input(tensor["shape"], tensor.get("data"), None if size is None else binary[end - size : end])
        for (name, tensor), size, end in zip(tensors, sizes, ends, strict=True)
    }


def _named(tensor: Any) -> tuple[str, dict[str, Any]]:
    match tensor:
        case {"name": str(name), "datatype": datatype, "shape": [*_]} if DATATYPES.get(name) == datatype:
            return name, tensor
    raise _invalid(EXPECTED)


def _samples(inputs: dict[str, _Input], limits: Limits) -> RequestImages:
    """Read the inputs of a request. RequestError for an invalid one."""
    texts = _texts(inputs["texts"], limits) if "texts" in inputs else []
    if "images" in inputs:
        pixels = _pixels(inputs["images"], limits)
        shape = pixels.shape
        cost = RESIZE_COST * math.prod(shape[:3]) / 1e6 + EACH * len(pixels)
        images = RequestImages(len(pixels), cost, [(shape[1], shape[2])] * len(pixels), pixels=pixels)
    elif "encoded" in inputs:
        files = _elements("encoded", inputs["encoded"], limits)
        images = encoded_images(files, numbered(len(files)), limits)
    else:
        images = encoded_images([None] * len(texts), numbered(len(texts)), limits)
        images = images._replace(has_image=[False] * len(texts))
    if texts and len(texts) != images.number:
        raise _invalid(f"`texts` has {len(texts)} elements for {images.number} images; send one text for each image")
    return images._replace(texts=texts)


def _pixels(tensor: _Input, limits: Limits) -> np.ndarray:
    shape = tensor.shape
    if len(shape) != 4 or any(type(side) is not int or side < 1 for side in shape) or shape[3] != 3:
        raise _invalid(f"`images` has shape {str(shape)[:40]}; expected [N, height, width, 3]")
    if shape[0] > limits.max_images:
        raise RequestError(413, "too_many_images", f"{shape[0]} images in one request; at most {limits.max_images}")
    if shape[1] * shape[2] > limits.max_pixels or math.prod(shape[:3]) > limits.max_total_pixels:
        limit = f"at most {limits.max_pixels:,} pixels in one and {limits.max_total_pixels:,} in all"
        detail = f"{shape[0]} images of {shape[1]} × {shape[2]} pixels are too large; {limit}"
        raise RequestError(413, "images_too_large", detail)
    if tensor.raw is not None:
        values = np.frombuffer(tensor.raw, np.uint8)
    else:
        try:
            numbers = np.array(tensor.data)
        except ValueError as err:  # rows of different lengths
            raise _invalid("the nested lists in `data` of `images` have different lengths") from err
        if _has_booleans(tensor.data, numbers):
            message = "`data` of `images` contains booleans; expected whole numbers in 0 … 255"
            raise RequestError(400, "invalid_request", message)
        if numbers.dtype.kind not in "iu" or (numbers.size and (numbers.min() < 0 or numbers.max() > 255)):
            raise _invalid("`data` of `images` must be whole numbers in 0 … 255")
        values = numbers.ravel().astype(np.uint8)
    if values.size != math.prod(shape):
        raise _invalid(f"`images` has shape {shape} but {values.size} values")
    return values.reshape(shape)


def _texts(tensor: _Input, limits: Limits) -> list[str]:
    elements = _elements("texts", tensor, limits)
    try:
        return [element if isinstance(element, str) else element.decode("utf-8") for element in elements]
    except UnicodeDecodeError as err:
        raise RequestError(400, "invalid_text", "an element of `texts` is not valid UTF-8") from err


def _elements(name: str, tensor: _Input, limits: Limits) -> list[Any]:
    """Return the elements of a BYTES tensor: bytes, and for texts of a JSON document str. RequestError unless their number is its shape."""
    elements = _listed(name, tensor.data, limits) if tensor.raw is None else _unpacked(name, tensor.raw, limits)
    if tensor.shape != [len(elements)]:
        raise _invalid(f"`{name}` has shape {str(tensor.shape)[:40]} but {len(elements)} elements")
    return elements


def _listed(name: str, data: Any, limits: Limits) -> list[Any]:
    if not isinstance(data, list) or not data or not all(isinstance(element, str | bytes) for element in data):
        kind = "base64 string, over gRPC at least one file" if name == "encoded" else "text"
        raise _invalid(f"`data` of `{name}` must be a list of at least one {kind}")
    _check_count(len(data), limits)
    if name == "texts":
        return data
    try:
        return [element if isinstance(element, bytes) else from_base64(element) for element in data]
    except ValueError as err:
        raise RequestError(400, "invalid_base64", "an element of `encoded` is not valid base64") from err


def _unpacked(name: str, raw: bytes, limits: Limits) -> list[bytes]:
    """Return the elements of raw contents, each of which follows its length."""
    elements, offset = [], 0
    while offset + 4 <= len(raw):
        (length,) = struct.unpack_from("<I", raw, offset)
        elements.append(raw[offset + 4 : offset + 4 + length])
        offset += 4 + length
        _check_count(len(elements), limits)
    if offset != len(raw) or not elements:
        raise _invalid(f"the binary data of `{name}` must be elements, each after its length as 4 bytes, little-endian")
    return elements


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_images:
        raise RequestError(413, "too_many_images", f"more than {limits.max_images} images in one request; send fewer")


def _has_booleans(data: Any, numbers: np.ndarray) -> bool:
    """Whether the nested lists that became `numbers` contain true or false, which NumPy converts to 1 and 0 next to numbers."""
    if numbers.dtype.kind not in "biuf":
        return False
    for _ in range(numbers.ndim - 1):
        data = chain.from_iterable(data)
    return numbers.ndim > 0 and bool in set(map(type, data))


def _binary_size(tensor: dict[str, Any]) -> int | None:
    """Return the bytes of an input after the JSON document; None if its values are in the document."""
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None and (type(size) is not int or size < 0):
        raise RequestError(400, "invalid_request", "`binary_data_size` must be a whole number of bytes, at least 0")
    return size


def _invalid(message: str) -> RequestError:
    return RequestError(422, "invalid_request", message)
