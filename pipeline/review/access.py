"""Which requests a review accepts: by host (against DNS rebinding), by origin (against forged requests of other pages) and by API key."""

import ipaddress
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from refract.api_keys import KeyFile, sent_key
from refract.errors import InputError
from refract.pipeline.review.problems import RequestError, rejected

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/@]+?)\.?(?::\d{1,5})?")
_WILDCARDS = ("0.0.0.0", "::", "")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach a server on `host`, a name or an IP address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_keys(host: str, keys: KeyFile | None) -> None:
    """Raise InputError if other machines can reach `host` and no key is needed."""
    if keys is None and not is_loopback(host):
        raise InputError(
            f"--host {host}: other machines could reach the images and decide on labels; "
            "add --keys FILE, a file with one API key per line, or listen on 127.0.0.1"
        )


class Access:
    """ASGI middleware that rejects requests which no page of this review sent, and that adds header fields against misuse to responses.

    host: where the server listens; keys: see `check_keys`. A request must name a loopback host or `host`; behind a wildcard
    address, such as 0.0.0.0, any name is accepted, as a page of another name has no key. Requests below `/api/` need a key if there are
    keys; its name is `request.state.reviewer`, which is None without keys.
    """

    def __init__(self, app: ASGIApp, *, host: str, keys: KeyFile | None) -> None:
        self._app, self._host, self._keys = app, host.strip("[]").lower(), keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": list(message["headers"])}
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            if scope["path"].startswith("/api/"):
                _check_origin(headers)
                scope.setdefault("state", {})["reviewer"] = self._reviewer(headers)
        except RequestError as error:
            await rejected(Request(scope), error)(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)

    def _check_host(self, headers: Headers) -> None:
        if self._host in _WILDCARDS:
            return
        match = _HOST.fullmatch(headers.get("host", "").lower())
        name = match[1] if match else ""
        if not is_loopback(name) and name.strip("[]") != self._host:
            raise RequestError(
                421,
                "unknown_host",
                f"this review is not at {name or 'this host'}; open it as {self._host} or localhost",
            )

    def _reviewer(self, headers: Headers) -> str | None:
        """Return the name of the key. RequestError 401 without a valid one."""
        if self._keys is None:
            return None
        sent = sent_key(headers.get("authorization", ""), headers.get("x-api-key", ""))
        key = self._keys.find(sent)
        if key is None:
            reason = "the API key is not one of this review's keys" if sent else "this review requires an API key"
            message = f"{reason}; send the header Authorization: Bearer KEY"
            raise RequestError(401, "unauthorized", message, {"WWW-Authenticate": "Bearer"})
        return key.name


def _check_origin(headers: Headers) -> None:
    """Raise RequestError for a request that a page of another origin made. Programs other than browsers send neither field."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if site not in ("same-origin", "none") or (
        origin is not None and origin.partition("://")[2] != headers.get("host")
    ):
        raise RequestError(
            403,
            "other_origin",
            "the request comes from a page of another origin; only the review's own page may send it",
        )
