"""Error responses of a review: problem details (RFC 9457) with a `code` for programs, as those of `refract serve`."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from refract.pipeline.labels.decisions import LabelDatabaseError

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"


class RequestError(Exception):
    """The review rejects the request. message: the `detail` that the client reads; headers: sent with the response."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


def problem(status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response with the members of RFC 9457, 3.1, and `code`."""
    content = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
    }
    return JSONResponse(content, status, headers, media_type=MEDIA_TYPE)


def rejected(_: Request, error: Any) -> JSONResponse:
    """Respond to a RequestError."""
    return problem(error.status, error.code, error.message, error.headers)


def _routing(request: Request, error: Any) -> JSONResponse:
    """Respond to an unknown path or method."""
    status = HTTPStatus(error.status_code)
    detail = f"{status.phrase}: {request.method} {request.url.path}"
    if allowed := (error.headers or {}).get("Allow"):
        detail += f"; allowed methods: {allowed}"
    return problem(status, status.name.lower(), detail, error.headers)


def _database_failed(_: Request, error: Any) -> JSONResponse:
    """Respond to a failure that may pass, such as a locked database: the page sends the decision again."""
    logger.error("%s", error)
    return problem(503, "database_failed", str(error), {"Retry-After": "2"})


def _failed(_: Request, error: Any) -> JSONResponse:
    """Respond to an internal error. The traceback goes to the log, not to the client."""
    return problem(500, "internal_error", "an internal error occurred; the log of refract review has the details")


HANDLERS: Mapping[Any, Any] = MappingProxyType(
    {RequestError: rejected, HTTPException: _routing, LabelDatabaseError: _database_failed, Exception: _failed}
)
