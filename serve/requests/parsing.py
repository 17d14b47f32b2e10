"""Extract images and texts from a request body: the file itself, a form, or JSON with base64 images. Independent of image formats."""

import base64
import json
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from python_multipart.multipart import parse_options_header

from refract.serve.errors import RequestError
from refract.serve.requests.multipart import parts_in

SPARE = 1024
"""JSON values allowed in addition to the images. Such a document gets a more specific error than \"too large\"."""

STRINGS = 1 << 16
"""Most JSON strings that are skipped to count the document's values."""

ACCEPTED = "image/*, application/octet-stream, multipart/form-data, application/json or text/plain"


class Sent(NamedTuple):
    """The samples of a request body. images: encoded, None for a sample without an image; texts: one for each image, or empty."""

    images: Sequence[bytes | None]
    texts: Sequence[str] = ()


def samples_in(content_type: str, body: bytes, *, max_images: int) -> Sent:
    """Return the images and texts of one request in order, at least one image or text.

    content_type: the header as received. Empty means application/octet-stream, as RFC 9110 §8.3 allows: common clients send raw bytes
    without the header. RequestError 415 for another type, 413 beyond `max_images`, 400 or 422 for a body that does not match its type.
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
    message = f"Content-Type is {media[:80]!r}; accepted are {ACCEPTED}"
    if media == "application/x-www-form-urlencoded":
        message += "; curl sends this type by default: add -H 'Content-Type: image/jpeg'"
    raise RequestError(415, "unsupported_media_type", message)


def parsed(text: bytes, *, objects: int, values: int) -> Any:
    """Parse a JSON document with at most `objects` objects, `values` lists and `values` commas. RequestError 413 beyond, before parsing:
    three bytes of JSON may take a hundred in memory. RequestError 400 for invalid JSON."""

    def too_many(parts: bytes) -> bool:
        return parts.count(b"{") > objects or max(parts.count(b"["), parts.count(b",")) > values

    # Strings, except base64, may contain these characters too. A comma, colon, brace or bracket precedes each string.
    if too_many(text) and too_many(_outside_strings(text, most=min(3 * (objects + values), STRINGS))):
        most = f"at most {objects:,} objects, {values:,} lists and {values:,} commas are allowed"
        raise RequestError(413, "json_too_large", f"the JSON document has too many values: {most}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        raise RequestError(400, "invalid_json", "the body is not valid JSON") from err


def _outside_strings(text: bytes, *, most: int) -> bytes:
    """Return a JSON document without its first `most` strings. A regular expression would take a second for 32 MB of escapes."""
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(plain.split(b'"', 2 * most)[::2])


def _from_form(files: list[bytes], texts: list[str]) -> Sent:
    if not files and not texts:
        raise RequestError(400, "no_files", "the form has no file; send each image as a part with a filename")
    if files and texts and len(files) != len(texts):
        message = (
            f"the form has {len(files)} files and {len(texts)} fields `text`; send one text for each file, or none"
        )
        raise RequestError(422, "invalid_request", message)
    return Sent(files or [None] * len(texts), texts)


def _from_json(body: bytes, *, max_images: int) -> Sent:
    images, texts = _columns(parsed(body, objects=SPARE, values=2 * max_images + SPARE))
    if max(len(images), len(texts)) > max_images:
        sent = f"{len(images)} images" if images else f"{len(texts)} texts"
        raise RequestError(413, "too_many_images", f"{sent} in one request; at most {max_images} are allowed")
    if not all(text is None or isinstance(text, str) for text in texts):
        raise RequestError(422, "invalid_request", "each text must be a string or null")
    encoded = [None if image is None else _decoded(index, image) for index, image in enumerate(images)]
    return Sent(encoded or [None] * len(texts), [text or "" for text in texts])


def _columns(document: Any) -> tuple[list[Any], list[Any]]:
    """Return (images, texts), of equal length if there are both."""
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
    problem = f"has {', '.join(map(repr, document))[:100]}" if isinstance(document, dict) else "is not an object"
    if isinstance(document, dict) and [] in document.values():
        problem += ", and an empty list"
    message = (
        'the JSON body must be {"image": base64}, {"images": [base64, …]}, {"text": "…"} or {"texts": ["…", …]} with at least one entry, '
        f"or an image with its text, or as many texts as images; this body {problem}"
    )
    raise RequestError(422, "invalid_request", message)


def _utf8(body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")  # removes the byte order mark that some editors write
    except UnicodeDecodeError as err:
        raise RequestError(400, "invalid_text", "the text is not valid UTF-8") from err


def _decoded(index: int, text: Any) -> bytes:
    if not isinstance(text, str):
        raise RequestError(422, "invalid_request", f"image {index} is not a string of base64")
    try:
        return from_base64(text)
    except ValueError as err:
        raise RequestError(400, "invalid_base64", f"image {index} is not valid base64") from err


def from_base64(text: str) -> bytes:
    """Decode base64 (RFC 4648) in either alphabet, with or without padding and line breaks, or a `data:` URI (RFC 2397).

    Padding, if present, must be correct. ValueError for anything else."""
    if text[:5].lower() == "data:":
        kind, comma, text = text.partition(",")
        if not comma:
            raise ValueError("the data: URI has no comma")
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
"""Translates the URL-safe alphabet (RFC 4648, 5) to the standard one."""
