"""The three ways to send images: as the body itself, as a form, as base64 in JSON. Knows nothing of pictures."""

import base64
import json
from typing import Any

from python_multipart.multipart import parse_options_header

from serve.errors import RequestError
from serve.form import files_in

ACCEPTED = "image/*, application/octet-stream, multipart/form-data or application/json"


def images_in(content_type: str, body: bytes, *, max_images: int) -> list[bytes]:
    """The encoded images of one request, at least one, in the order sent.

    content_type: the header as received; empty counts as application/octet-stream, as RFC 9110 §8.3 allows, because
    common clients send raw bytes without one. RequestError 415 for another type, 413 beyond `max_images`, 400 or 422
    for a body that is not what its type says.
    """
    kind, options = parse_options_header(content_type)
    media = kind.decode("latin-1").lower()
    if media.startswith("image/") or media in ("", "application/octet-stream"):
        return [body]
    if media == "application/json":
        return _from_json(body, max_images=max_images)
    if media == "multipart/form-data":
        return files_in(body, options.get(b"boundary", b""), max_images=max_images)
    raise RequestError(415, "unsupported_media_type", f"Content-Type is {media[:80]!r}; accepted are {ACCEPTED}")


def _from_json(body: bytes, *, max_images: int) -> list[bytes]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as err:
        raise RequestError(400, "invalid_json", "the body is not valid JSON") from err
    texts = _texts(document)
    if len(texts) > max_images:
        raise RequestError(413, "too_many_images", f"{len(texts)} images in one request; at most {max_images}")
    return [_decoded(index, text) for index, text in enumerate(texts)]


def _texts(document: Any) -> list[Any]:
    match document:
        case {"image": str() as text} if len(document) == 1:
            return [text]
        case {"images": [_, *_] as texts} if len(document) == 1:
            return texts
    message = 'the JSON body must be {"image": base64} or {"images": [base64, …]} with at least one image'
    raise RequestError(422, "invalid_request", message)


def _decoded(index: int, text: Any) -> bytes:
    if not isinstance(text, str):
        raise RequestError(422, "invalid_request", f"image {index} is not a string of base64")
    try:
        # Line breaks are fine: `base64` and Python's encodebytes wrap at 76 characters.
        # A browser's form begins with what it is.
        content = text.partition(",")[2] if text.startswith("data:") else text
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as err:
        raise RequestError(400, "invalid_base64", f"image {index} is not valid base64") from err
