"""Every answer that is not a prediction: problem details as of RFC 9457, with a `code` for programs, and nothing of our insides."""

from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from serve.batcher import BatchError, ClosedError, OverloadedError


class RequestError(Exception):
    """The client asked for something that is refused. `message` is written for the client."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class NotReadyError(Exception):
    """The self-test has not passed, or the server is going down."""


def answer(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The one shape of an error."""
    title = HTTPStatus(status).phrase
    problem = {"type": "about:blank", "title": title, "status": status, "detail": message, "code": code}
    return JSONResponse(problem, status_code=status, headers=headers, media_type="application/problem+json")


def _refused(_: Request, error: RequestError) -> JSONResponse:
    return answer(error.status, error.code, error.message)


def _routing(request: Request, error: HTTPException) -> JSONResponse:
    """404 and 405 of the router, with the `Allow` header that it found."""
    status = HTTPStatus(error.status_code)
    message = f"{status.phrase}: {request.method} {request.url.path}"
    return answer(error.status_code, status.name.lower(), message, error.headers)


def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """A query parameter of the wrong type or range; the offending name and rule, not pydantic's whole report."""
    first = error.errors()[0]
    where = " ".join(str(part) for part in first["loc"])
    return answer(422, "invalid_parameter", f"{where}: {first['msg']}")


def _overloaded(_: Request, error: OverloadedError) -> JSONResponse:
    return answer(429, "overloaded", str(error), {"Retry-After": "1"})


def _not_ready(_: Request, error: NotReadyError | ClosedError) -> JSONResponse:
    return answer(503, "not_ready", str(error), {"Retry-After": "5"})


def _failed(_: Request, error: Exception) -> JSONResponse:
    """Our fault: the log has the traceback, the client has none of it."""
    return answer(500, "internal_error", "the server failed to answer this request")


def install(app: FastAPI) -> None:
    """Make `app` answer every failure as JSON."""
    for kind, handler in (
        (RequestError, _refused),
        (HTTPException, _routing),
        (RequestValidationError, _invalid),
        (OverloadedError, _overloaded),
        (NotReadyError, _not_ready),
        (ClosedError, _not_ready),
        (BatchError, _failed),
        (Exception, _failed),
    ):
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]
