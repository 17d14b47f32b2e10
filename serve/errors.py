"""Why the server rejects a request. `refract.serve.http.errors` and `refract.serve.grpc.server` turn these errors into responses."""

from collections.abc import Mapping


class RequestError(Exception):
    """The server rejects the request. message: the `detail` that the client reads; headers: sent with the response."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class NotReadyError(Exception):
    """The self-test has not passed, or the server is shutting down."""
