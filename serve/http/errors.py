"""Every answer that is not a prediction: problem details as of RFC 9457, with a `code` for programs, and nothing of our insides."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from refract.serve.http.base_path import route_path
from refract.serve.http.methods import allowed
from refract.serve.requests.limits import OverloadedError
from refract.serve.runtime.batcher import BatchError, ClosedError

MEDIA_TYPE = "application/problem+json"


class RequestError(Exception):
    """The client asked for something that is refused. `message` is written for the client; headers: sent with it."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class NotReadyError(Exception):
    """The self-test has not passed, or the server is going down."""


@dataclass(frozen=True)
class Problem:
    """What a failure is to the client. Source of its form: RFC 9457."""

    status: int
    code: str
    detail: str
    headers: Mapping[str, str] | None = None

    @property
    def content(self) -> dict[str, Any]:
        """Its members (RFC 9457, 3.1)."""
        title = HTTPStatus(self.status).phrase
        return {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail, "code": self.code}

    def response(self, more: dict[str, Any]) -> JSONResponse:
        return JSONResponse(self.content | more, self.status, self.headers, media_type=MEDIA_TYPE)


def _refused(_: Request, error: RequestError) -> Problem:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else error.headers
    return Problem(error.status, error.code, error.message, headers)


def _routing(request: Request, error: HTTPException) -> Problem:
    """404 and 405 of the router, which knows in `Allow` the methods of one route alone."""
    status = HTTPStatus(error.status_code)
    message, headers = f"{status.phrase}: {request.method} {request.url.path}", error.headers
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        methods = ", ".join(allowed(request.app.routes, request.scope))
        message, headers = f"{message}; allowed are {methods}", {"Allow": methods}
    return Problem(error.status_code, status.name.lower(), message, headers)


def _invalid(_: Request, error: RequestValidationError) -> Problem:
    """A query parameter of the wrong type or range; the offending name and rule, not pydantic's whole report."""
    first = error.errors()[0]
    where = " ".join(str(part) for part in first["loc"])
    return Problem(422, "invalid_parameter", f"{where}: {first['msg']}")


def _overloaded(_: Request, error: OverloadedError) -> Problem:
    return Problem(429, error.code, str(error), {"Retry-After": str(error.after_s)})


def _not_ready(_: Request, error: NotReadyError | ClosedError) -> Problem:
    return Problem(503, "not_ready", str(error), {"Retry-After": "5"})


def _failed(_: Request, error: Exception) -> Problem:
    """Our fault: the log has the traceback, the client has none of it."""
    return Problem(500, "internal_error", "the server failed to answer this request")


_HANDLERS: Mapping[type[Exception], Callable[[Request, Any], Problem]] = MappingProxyType(
    {
        RequestError: _refused,
        HTTPException: _routing,
        RequestValidationError: _invalid,
        OverloadedError: _overloaded,
        NotReadyError: _not_ready,
        ClosedError: _not_ready,
        BatchError: _failed,
        Exception: _failed,
    }
)


Refused = Callable[[Request, Exception], JSONResponse]
"""The answer to a request that failed."""


def install(app: FastAPI, counted: Callable[[str, str], None]) -> Refused:
    """Make `app` answer every failure as a problem. counted: is told the path and the code of each. Returns what makes the answers, for
    failures that `app` does not see."""

    def refused(request: Request, error: Exception) -> JSONResponse:
        problem_of = next(_HANDLERS[kind] for kind in type(error).__mro__ if kind in _HANDLERS)
        problem = problem_of(request, error)
        request.state.code = problem.code  # for the access log
        path = route_path(request.scope)
        counted(path, problem.code)
        # The Open Inference Protocol has a word of its own for what went wrong.
        return problem.response({"error": problem.detail} if path.startswith("/v2") else {})

    for kind in _HANDLERS:
        app.add_exception_handler(kind, refused)
    return refused
