"""Parse inference requests of the Open Inference Protocol, version 2. Their routes: `refract.serve.http.routes.v2`."""

import math
import struct
from itertools import chain
from typing import Any

import numpy as np

from refract.serve.http.errors import RequestError
from refract.serve.requests.decoding import EACH, ParsedRequest, RequestImages, encoded_images, numbered
from refract.serve.requests.limits import Limits
from refract.serve.requests.parsing import SPARE, from_base64, parsed

RESIZE_COST = 0.1
"""The cost of a pixel that is only resized, as a fraction of the cost of one that is also decoded."""

HEADER = "inference-header-content-length"
"""The header field with the length of the JSON document, if binary tensors follow it."""

OUTPUTS = ("probabilities", "label")
"""The outputs of a request that names none."""

OPTIONAL_OUTPUTS = ("embedding",)
"""The outputs that a request must name."""


def read_infer(body: bytes, json_length: str | None, limits: Limits) -> ParsedRequest:
    """Parse the body of an HTTP request. json_length: the value of HEADER, None without one. RequestError 4xx."""
    return read_document(*_parts(body, json_length, limits), limits)


def read_document(document: dict[str, Any], binary: bytes, limits: Limits) -> ParsedRequest:
    """Parse a request in the form of its JSON document; over gRPC the elements of `encoded` are bytes. binary: the binary tensor after it.
    RequestError 4xx."""
    outputs, number = _outputs(document.get("outputs")), document.get("id")
    images = _images(document.get("inputs"), binary, limits)
    return ParsedRequest(images, outputs, number if isinstance(number, str) else None)


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


def _images(inputs: Any, binary: bytes, limits: Limits) -> RequestImages:
    """Read the one input of a request. RequestError unless it is one of INPUTS."""
    match inputs:
        case [{"name": "images", "datatype": "UINT8", "shape": [*shape]} as tensor]:
            images = _tensor(tensor, shape, binary, limits)
            cost = RESIZE_COST * math.prod(shape[:3]) / 1e6 + EACH * len(images)
            return RequestImages(len(images), cost, [(shape[1], shape[2])] * len(images), pixels=images)
        case [{"name": "encoded", "datatype": "BYTES", "shape": [*shape]} as tensor]:
            files = _files(tensor, binary, limits)
            if shape != [len(files)]:
                raise _invalid(f"`encoded` has shape {str(shape)[:40]} but {len(files)} elements")
            return encoded_images(files, numbered(len(files)), limits)
    raise _invalid("`inputs` must be one tensor: `images`, UINT8 [N, height, width, 3], or `encoded`, BYTES [N]")


def _tensor(tensor: dict[str, Any], shape: list[Any], binary: bytes, limits: Limits) -> np.ndarray:
    if len(shape) != 4 or any(type(side) is not int or side < 1 for side in shape) or shape[3] != 3:
        raise _invalid(f"`images` has shape {str(shape)[:40]}; expected [N, height, width, 3]")
    if shape[0] > limits.max_images:
        raise RequestError(413, "too_many_images", f"{shape[0]} images in one request; at most {limits.max_images}")
    if shape[1] * shape[2] > limits.max_pixels or math.prod(shape[:3]) > limits.max_total_pixels:
        limit = f"at most {limits.max_pixels:,} pixels in one and {limits.max_total_pixels:,} in all"
        detail = f"{shape[0]} images of {shape[1]} × {shape[2]} pixels are too large; {limit}"
        raise RequestError(413, "images_too_large", detail)
    size = _binary_size(tensor, binary)
    if size is not None:
        values = np.frombuffer(binary[:size], np.uint8)
    else:
        try:
            numbers = np.array(tensor.get("data"))
        except ValueError as err:  # rows of different lengths
            raise _invalid("the nested lists in `data` of `images` have different lengths") from err
        if _has_booleans(tensor.get("data"), numbers):
            message = "`data` of `images` contains booleans; expected whole numbers in 0 … 255"
            raise RequestError(400, "invalid_request", message)
        if numbers.dtype.kind not in "iu" or (numbers.size and (numbers.min() < 0 or numbers.max() > 255)):
            raise _invalid("`data` of `images` must be whole numbers in 0 … 255")
        values = numbers.ravel().astype(np.uint8)
    if values.size != math.prod(shape):
        raise _invalid(f"`images` has shape {shape} but {values.size} values")
    return values.reshape(shape)


def _files(tensor: dict[str, Any], binary: bytes, limits: Limits) -> list[bytes]:
    size = _binary_size(tensor, binary)
    if size is None:
        texts = tensor.get("data")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str | bytes) for text in texts):
            raise _invalid(
                "`data` of `encoded` must be a list of at least one base64 string, over gRPC at least one file"
            )
        _check_count(len(texts), limits)
        try:
            return [text if isinstance(text, bytes) else from_base64(text) for text in texts]
        except ValueError as err:
            raise RequestError(400, "invalid_base64", "an element of `encoded` is not valid base64") from err
    files, offset, end = [], 0, min(size, len(binary))
    while offset + 4 <= end:  # each element follows its length
        (length,) = struct.unpack_from("<I", binary, offset)
        files.append(binary[offset + 4 : offset + 4 + length])
        offset += 4 + length
        _check_count(len(files), limits)
    if offset != end or end != size or not files:
        raise _invalid("the binary data of `encoded` must be elements, each after its length as 4 bytes, little-endian")
    return files


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


def _binary_size(tensor: dict[str, Any], binary: bytes) -> int | None:
    """Return the size of the input in `binary`, which must hold nothing else, in bytes; None if its data are in the JSON document."""
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None and (type(size) is not int or size < 0):
        raise RequestError(400, "invalid_request", "`binary_data_size` must be a whole number of bytes, at least 0")
    if len(binary) > (size or 0):
        message = f"{len(binary)} bytes follow the JSON document, but `binary_data_size` is {size or 0}"
        raise RequestError(400, "invalid_request", message)
    return size


def _invalid(message: str) -> RequestError:
    return RequestError(422, "invalid_request", message)
