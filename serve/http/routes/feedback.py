"""`POST /v1/feedback`: the true labels of a prediction, which the client learns later."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from refract.serve.errors import RequestError
from refract.serve.feedback.feedback_log import FeedbackLog
from refract.serve.http.openapi import FEEDBACK_BODY, FEEDBACK_DESCRIPTION, FEEDBACK_RESPONSES
from refract.serve.requests.body import Bodies
from refract.serve.requests.limits import MIB
from refract.serve.runtime.service import Service

logger = logging.getLogger(__name__)

FEEDBACK = "/v1/feedback"
MOST_NAMED = 20
"""Most labels that an error lists."""


@dataclass(frozen=True)
class Feedback:
    """A parsed body. labels: indices, each once; index: the index of the image in its request, None if the client gave none."""

    id: str
    labels: list[int]
    index: int | None


def add_feedback(app: FastAPI, service: Service, log: FeedbackLog | None, allowed: list[Any]) -> None:
    """Add the route. log: receives each accepted feedback. allowed: the dependencies that check the key."""
    limits = replace(service.limits, max_body_bytes=min(MIB, service.limits.max_body_bytes))
    bodies, info = Bodies(limits), service.models.engine.bundle.info
    known = {label: index for index, label in enumerate(info.labels)}

    @app.post(
        FEEDBACK,
        summary="Send the true labels of a prediction",
        description=FEEDBACK_DESCRIPTION,
        dependencies=allowed,
        openapi_extra=FEEDBACK_BODY,
        responses=FEEDBACK_RESPONSES,
    )
    async def feedback(request: Request) -> JSONResponse:
        if service.recent is None:
            message = "this server keeps no predictions, as it was started with --feedback-keep 0"
            raise RequestError(404, "feedback_disabled", message)
        body = await bodies.read(request)
        try:
            given = _parsed(body, known, single=info.task != "multilabel")
        finally:
            bodies.release(body)
        judgement = service.recent.judge(given.id, given.labels, given.index)
        predicted = [info.labels[i] for i in judgement.predicted]
        content = {"predicted": predicted, "correct": judgement.correct, "model": judgement.model}
        if log:
            labels = [info.labels[i] for i in given.labels]
            await _store(log, given.id, judgement.index, {"labels": labels, **content})
        service.metrics.judged("replaced" if judgement.replaced else "accepted")
        content |= {"id": given.id, "index": judgement.index, "replaced": judgement.replaced}
        return JSONResponse(content)


async def _store(log: FeedbackLog, request_id: str, index: int, values: dict[str, Any]) -> None:
    try:
        await log.append(request_id, index, values)
    except OSError as err:
        logger.warning("feedback cannot be written: %s", err)
        message = "the server cannot store the feedback; send it again later"
        raise RequestError(503, "feedback_not_stored", message, {"Retry-After": "5"}) from err


def _parsed(body: bytes, known: Mapping[str, int], *, single: bool) -> Feedback:
    """Parse a body. known: index of each label; single: whether exactly one label is true. RequestError 400 or 422."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as err:
        raise RequestError(400, "invalid_json", "the body is not JSON") from err
    members = {"id", "labels", "index"}
    if not isinstance(content, dict) or not {"id", "labels"} <= content.keys() <= members:
        raise _invalid(
            'expected an object such as {"id": "…", "labels": ["cat"]}; its members are id, labels and index'
        )
    request_id, labels, index = content["id"], content["labels"], content.get("index")
    if not isinstance(request_id, str) or not request_id:
        raise _invalid("id: expected the X-Request-Id of the response, a text")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise _invalid("labels: expected a list of texts")
    if index is not None and (not isinstance(index, int) or isinstance(index, bool) or index < 0):
        raise _invalid("index: expected the position of the image in its request, from 0")
    labels = list(dict.fromkeys(labels))
    for label in labels:
        if label not in known:
            raise RequestError(422, "unknown_label", f"unknown label {label[:40]!r}; known: {_listed(known)}")
    if single and len(labels) != 1:
        raise _invalid(f"labels: expected one label, as this model predicts one; received {len(labels)}")
    return Feedback(request_id, [known[label] for label in labels], index)


def _listed(known: Mapping[str, int]) -> str:
    names = list(known)
    more = f" and {len(names) - MOST_NAMED:,} more, which /v1/model lists" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _invalid(message: str) -> RequestError:
    return RequestError(422, "invalid_request", message)
