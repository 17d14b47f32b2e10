"""Error responses: problem details (RFC 9457) with a `code` for programs. They reveal no internals of the server."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from refract.serve.errors import NotReadyError, RequestError
from refract.serve.http.base_path import route_path
from refract.serve.http.methods import allowed
from refract.serve.requests.limits import OverloadedError
from refract.serve.runtime.batcher import BatchError, ClosedError

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True)
class Problem:
    """The problem details that the client receives for a failure. Source: RFC 9457."""

    status: int
    code: str
    detail: str
    headers: Mapping[str, str] | None = None

    @property
    def content(self) -> dict[str, Any]:
        """The members of the JSON document (RFC 9457, 3.1)."""
        title = HTTPStatus(self.status).phrase
        return {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail, "code": self.code}

    def response(self, extra: dict[str, Any]) -> JSONResponse:
        """Return the HTTP response. extra: additional members."""
        return JSONResponse(self.content | extra, self.status, self.headers, media_type=MEDIA_TYPE)


def _rejected(_: Request | None, error: RequestError) -> Problem:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else error.headers
    return Problem(error.status, error.code, error.message, headers)


def _routing(request: Request, error: HTTPException) -> Problem:
    """Convert 404 and 405 of the router. Its `Allow` lists the methods of a single route, so it is replaced by those of the path."""
    status = HTTPStatus(error.status_code)
    detail, headers = f"{status.phrase}: {request.method} {request.url.path}", error.headers
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        methods = ", ".join(allowed(request.app.routes, request.scope))
        detail, headers = f"{detail}; allowed methods: {methods}", {"Allow": methods}
    return Problem(error.status_code, status.name.lower(), detail, headers)


def _invalid(_: Request, error: RequestValidationError) -> Problem:
    """Report a query parameter of the wrong type or range: its name and the broken rule, not pydantic's whole report."""
    first = error.errors()[0]
    location = " ".join(str(part) for part in first["loc"])
    return Problem(422, "invalid_parameter", f"{location}: {first['msg']}")


def _overloaded(_: Request | None, error: OverloadedError) -> Problem:
    return Problem(429, error.code, str(error), {"Retry-After": str(error.after_s)})


def _not_ready(_: Request | None, error: NotReadyError | ClosedError) -> Problem:
    return Problem(503, "not_ready", str(error), {"Retry-After": "5"})


def _failed(_: Request | None, error: Exception) -> Problem:
    """Report an internal error. The traceback goes to the log, not to the client."""
    return Problem(500, "internal_error", "an internal error occurred; the server's log has the details")


_HANDLERS: Mapping[type[Exception], Callable[[Any, Any], Problem]] = MappingProxyType(
    {
        RequestError: _rejected,
        HTTPException: _routing,
        RequestValidationError: _invalid,
        OverloadedError: _overloaded,
        NotReadyError: _not_ready,
        ClosedError: _not_ready,
        BatchError: _failed,
        Exception: _failed,
    }
)


def problem_of(error: Exception, request: Request | None = None) -> Problem:
    """Return what a client learns of `error`. request: the HTTP request, None for another protocol, which raises no errors of routing."""
    handler = next(_HANDLERS[kind] for kind in type(error).__mro__ if kind in _HANDLERS)
    return handler(request, error)


ProblemResponder = Callable[[Request, Exception], JSONResponse]
"""Builds the error response to a request that failed with an exception."""


def install(app: FastAPI, count: Callable[[str, str], None]) -> ProblemResponder:
    """Make `app` answer every exception with problem details. count: called with the path and the `code` of each problem. Returns the
    function that builds the responses, for exceptions raised outside `app`."""

    def respond(request: Request, error: Exception) -> JSONResponse:
        problem = problem_of(error, request)
        request.state.code = problem.code  # for the access log
        path = route_path(request.scope)
        count(path, problem.code)
        # The Open Inference Protocol puts the error message into the member `error`.
        return problem.response({"error": problem.detail} if path.startswith("/v2") else {})

    for kind in _HANDLERS:
        app.add_exception_handler(kind, respond)
    return respond
