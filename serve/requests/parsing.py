"""The ways to send images and texts: as the body itself, as a form, in JSON with images in base64. Knows nothing of images."""

import base64
import json
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from python_multipart.multipart import parse_options_header

from refract.serve.http.errors import RequestError
from refract.serve.requests.multipart import parts_in

SPARE = 1024
"""Parts of a JSON document beside its images, which may be answered with a better message than that they are too many."""

STRINGS = 1 << 16
"""Strings of a JSON document that are looked past in counting its parts."""

ACCEPTED = "image/*, application/octet-stream, multipart/form-data, application/json or text/plain"


class Sent(NamedTuple):
    """images: encoded, None for what has none; texts: as many, or none at all."""

    images: Sequence[bytes | None]
    texts: Sequence[str] = ()


def samples_in(content_type: str, body: bytes, *, max_images: int) -> Sent:
    """The images and texts of one request, at least one of either, in the order sent.

    content_type: the header as received; empty counts as application/octet-stream, as RFC 9110 §8.3 allows, because
    common clients send raw bytes without one. RequestError 415 for another type, 413 beyond `max_images`, 400 or 422
    for a body that is not what its type says.
    """
    kind, options = parse_options_header(content_type)
    media = kind.decode("latin-1").lower()
    if media.startswith("image/") or media in ("", "application/octet-stream"):
        return Sent([body])
    if media == "application/json":
        return _from_json(body, max_images=max_images)
    if media == "multipart/form-data":
        return _from_form(*parts_in(body, options.get(b"boundary", b""), max_images=max_images))
    if media == "text/plain":
        return Sent([None], [_utf8(body)])
    told = f"Content-Type is {media[:80]!r}; accepted are {ACCEPTED}"
    if media == "application/x-www-form-urlencoded":
        told += "; curl sends this one by itself: add -H 'Content-Type: image/jpeg'"
    raise RequestError(415, "unsupported_media_type", told)


def parsed(text: bytes, *, objects: int, values: int) -> Any:
    """A JSON document of at most so many objects, and so many lists and values. RequestError 413 beyond, before anything is made of it:
    three bytes of it may become a hundred; 400 where it is none."""

    def too_many(parts: bytes) -> bool:
        return parts.count(b"{") > objects or max(parts.count(b"["), parts.count(b",")) > values

    # Strings hold them too, though not those of base64. Before each stands a comma, a colon, or what opens an object or a list.
    if too_many(text) and too_many(_outside_strings(text, most=min(3 * (objects + values), STRINGS))):
        most = f"at most {objects:,} objects, {values:,} lists and as many commas"
        raise RequestError(413, "json_too_large", f"the JSON document has more parts than a request needs: {most}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        raise RequestError(400, "invalid_json", "the body is not valid JSON") from err


def _outside_strings(text: bytes, *, most: int) -> bytes:
    """A JSON document without its first `most` strings. Not by a pattern, which takes a second for 32 MB of escapes."""
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(plain.split(b'"', 2 * most)[::2])


def _from_form(files: list[bytes], texts: list[str]) -> Sent:
    if not files and not texts:
        raise RequestError(400, "no_files", "the form has no file; send each image as a part with a filename")
    if files and texts and len(files) != len(texts):
        message = f"the form has {len(files)} files and {len(texts)} parts `text`; send none or one for each file"
        raise RequestError(422, "invalid_request", message)
    return Sent(files or [None] * len(texts), texts)


def _from_json(body: bytes, *, max_images: int) -> Sent:
    images, texts = _columns(parsed(body, objects=SPARE, values=2 * max_images + SPARE))
    if max(len(images), len(texts)) > max_images:
        sent = f"{len(images)} images" if images else f"{len(texts)} texts"
        raise RequestError(413, "too_many_images", f"{sent} in one request; at most {max_images}")
    if not all(text is None or isinstance(text, str) for text in texts):
        raise RequestError(422, "invalid_request", "a text is neither a string nor null")
    found = [None if image is None else _decoded(index, image) for index, image in enumerate(images)]
    return Sent(found or [None] * len(texts), [text or "" for text in texts])


def _columns(document: Any) -> tuple[list[Any], list[Any]]:
    """(images, texts), equally many where there are both."""
    match document:
        case {"image": str() as image} if set(document) <= {"image", "text"}:
            return [image], [document["text"]] if "text" in document else []
        case {"text": str() as text} if len(document) == 1:
            return [], [text]
        case {"images": [_, *_] as images} if len(document) == 1:
            return images, []
        case {"texts": [_, *_] as texts} if len(document) == 1:
            return [], texts
        case {"images": [_, *_] as images, "texts": [*texts]} if len(document) == 2 and len(images) == len(texts):
            return images, texts
    given = f"has {', '.join(map(repr, document))[:100]}" if isinstance(document, dict) else "is no object"
    if isinstance(document, dict) and [] in document.values():
        given += ", and an empty list"
    message = (
        'the JSON body must be {"image": base64}, {"images": [base64, …]}, {"text": "…"} or {"texts": ["…", …]} with at least one; or an '
        f"image with its text, or as many texts as images. This one {given}"
    )
    raise RequestError(422, "invalid_request", message)


def _utf8(body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")  # the mark that some editors begin a file with is no part of the text
    except UnicodeDecodeError as err:
        raise RequestError(400, "invalid_text", "the text is not UTF-8") from err


def _decoded(index: int, text: Any) -> bytes:
    if not isinstance(text, str):
        raise RequestError(422, "invalid_request", f"image {index} is not a string of base64")
    try:
        return from_base64(text)
    except ValueError as err:
        raise RequestError(400, "invalid_base64", f"image {index} is not valid base64") from err


def from_base64(text: str) -> bytes:
    """The bytes of base64 (RFC 4648) in either alphabet, with or without padding and line breaks, or of a `data:` URI (RFC 2397).

    Padding that is there must be right. ValueError for anything else."""
    if text[:5].lower() == "data:":
        kind, comma, text = text.partition(",")
        if not comma:
            raise ValueError("a data: URI has a comma")
        if "%" in text:
            content = unquote_to_bytes(text)
            if not kind.rstrip().lower().endswith(";base64"):
                return content
            text = content.decode("ascii")
    text = "".join(text.split()).translate(_STANDARD)  # `base64` and Python's encodebytes wrap at 76 characters
    if not text.endswith("="):
        text += "=" * (-len(text) % 4)
    return base64.b64decode(text, validate=True)


_STANDARD = str.maketrans("-_", "+/")
"""The URL-safe alphabet (RFC 4648, 5) to the standard one."""
