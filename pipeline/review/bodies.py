"""Parse the JSON bodies of a review's requests. Each error names the member, its value and what is accepted."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from refract.pipeline.labels.decisions import ACTIONS
from refract.pipeline.review.problems import RequestError

LONGEST_BODY = 1 << 16
"""Most bytes of a request body."""

_LARGEST = 2**63 - 1
"""The largest ID of a database."""

ACCEPTED_ACTIONS = tuple(action for action in ACTIONS if action != "undo")
"""Actions of a decision. Undo has a separate route."""


@dataclass(frozen=True)
class DecisionBody:
    """The body of `POST /api/decisions`.

    item: its index; content: SHA-256 of the image that the reviewer saw, empty if the client does not send it; seen: ID of the newest
    record that the reviewer saw; reviewer: ignored if the key names the reviewer.
    """

    item: int
    action: str
    labels: tuple[str, ...]
    queue: str
    content: str = ""
    reason: str = ""
    seen: int | None = None
    reviewer: str = ""


@dataclass(frozen=True)
class UndoBody:
    """The body of `POST /api/undo`. record: ID of the decision."""

    record: int
    reviewer: str = ""


async def decision(request: Request, *, queues: Collection[str]) -> DecisionBody:
    """Return the decision in the body. RequestError 4xx for an invalid one."""
    body = await _members(request, ("item", "action", "labels", "queue", "content", "reason", "seen", "reviewer"))
    labels = body.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise _invalid("labels", labels, "a list of texts")
    seen = body.get("seen")
    return DecisionBody(
        item=_integer(body, "item"),
        action=_one_of(body, "action", ACCEPTED_ACTIONS),
        labels=tuple(labels),
        queue=_one_of(body, "queue", queues),
        content=_text(body, "content"),
        reason=_text(body, "reason"),
        seen=None if seen is None else _integer(body, "seen"),
        reviewer=_text(body, "reviewer"),
    )


async def undo(request: Request) -> UndoBody:
    """Return which decision to undo. RequestError 4xx for an invalid body."""
    body = await _members(request, ("record", "reviewer"))
    return UndoBody(_integer(body, "record"), _text(body, "reviewer"))


async def _members(request: Request, accepted: Collection[str]) -> Mapping[str, Any]:
    """Return the JSON object of the body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form of another page can send other types without the browser asking first
        message = f"the content type is {kind or 'missing'!r}; send application/json"
        raise RequestError(415, "unsupported_media_type", message)
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > LONGEST_BODY:
                raise RequestError(413, "body_too_large", f"the body has more than {LONGEST_BODY:,} bytes")
    except ClientDisconnect as err:
        raise RequestError(400, "client_disconnected", "the client disconnected before its body arrived") from err
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise RequestError(400, "invalid_json", f"the body is not JSON: {err}") from err
    if not isinstance(body, dict):
        raise RequestError(422, "invalid_body", f"the body is not a JSON object; its members are {', '.join(accepted)}")
    if unknown := sorted(body.keys() - set(accepted)):
        message = f"unknown member {unknown[0][:100]!r}; accepted: {', '.join(accepted)}"
        raise RequestError(422, "unknown_member", message)
    return body


def _integer(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
        raise _invalid(name, value, "an integer from 0")
    return value


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name, "")
    if not isinstance(value, str):
        raise _invalid(name, value, "a text")
    return value


def _one_of(body: Mapping[str, Any], name: str, accepted: Collection[str]) -> str:
    value = body.get(name)
    if not isinstance(value, str) or value not in accepted:
        raise _invalid(name, value, f"one of {', '.join(accepted)}")
    return value


def _invalid(name: str, value: object, accepted: str) -> RequestError:
    return RequestError(422, "invalid_member", f"{name}: is {json.dumps(value)[:100]}; expected {accepted}")
