"""Send one event over HTTP: a POST of JSON, signed with HMAC-SHA256 if REFRACT_WEBHOOK_SECRET is set. No redirect is followed."""

import os
import threading
from datetime import datetime
from urllib.parse import urlsplit

from refract.models.credentials import masked

URL, SECRET = "REFRACT_WEBHOOK_URL", "REFRACT_WEBHOOK_SECRET"
"""Environment variables: the address instead of the config's, and the key of the signature."""

TIMEOUT_S = 5.0
"""The longest wait in seconds for a connection, or for the next part of a response."""

DEADLINE_S = 8.0
"""The longest time of a delivery in seconds: a server that sends a byte now and then never exceeds TIMEOUT_S."""

TRANSIENT = (408, 425, 429)
"""Statuses below 500 after which the next attempt may succeed."""


class NotDelivered(Exception):
    """The event was not accepted. refused: the server responded, and other events may be accepted."""

    def __init__(self, reason: str, *, refused: bool) -> None:
        super().__init__(reason)
        self.refused = refused


def problem_of(url: str, *, stored: bool = False) -> str | None:
    """Return what is expected if the text cannot be the address of a webhook, None if it can.

    stored: whether it is in a config, which runs and bundles store. Such an address has no credentials.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or " " in url:
        return "an address such as https://example.com/hook"
    if parts.username is not None:
        return "an address without a user name and a password; check the signature instead"
    if stored and masked(url) != url:
        return f"an address without a token; set the whole address as {URL}"
    return None


def send(url: str, event: str, body: bytes, now: datetime) -> None:
    """Send the body, and return when the server has accepted it with a status 2xx. NotDelivered otherwise, after DEADLINE_S at most.

    event: the ID of the event, so that the receiver can ignore a second delivery.
    """
    stamp = str(int(now.timestamp()))
    headers = {
        "Content-Type": "application/json; charset=utf-8",
        "User-Agent": "refract",
        "X-Refract-Event": event,
        "X-Refract-Timestamp": stamp,
    }
    host = urlsplit(url).hostname
    try:
        if key := os.environ.get(SECRET):
            headers["X-Refract-Signature"] = signature(key, stamp, body)
    except UnicodeEncodeError:
        raise NotDelivered(f"{host}: {SECRET} is not valid UTF-8; set another one", refused=False) from None
    results: list[NotDelivered | None] = []
    # A thread, as no timeout of a socket limits the whole exchange, and none the search for the host's address.
    sender = threading.Thread(
        target=lambda: results.append(_result(url, body, headers)), daemon=True, name="webhook-send"
    )
    sender.start()
    sender.join(DEADLINE_S)
    result = results[0] if results else NotDelivered(f"{host}: no response in {DEADLINE_S:g} s", refused=False)
    if result is not None:
        raise result


def _result(url: str, body: bytes, headers: dict[str, str]) -> NotDelivered | None:
    """Send the body. Returns why the server has not accepted it, None if it has."""
    import urllib.error  # imports SSL and the email package, which every command would load with its config
    import urllib.request
    from http.client import HTTPException

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        """Treats a redirect as a refusal: a POST that follows it would become a GET without the event."""

        def redirect_request(self, *_: object, **__: object) -> None:
            return None

    host = urlsplit(url).hostname
    try:
        request = urllib.request.Request(url, body, headers, method="POST")
        with urllib.request.build_opener(NoRedirect).open(request, timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        refused = error.code < 500 and error.code not in TRANSIENT
        return NotDelivered(f"{host} responded with status {error.code}", refused=refused)
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        return NotDelivered(f"{host}: {reason}", refused=False)


def signature(key: str, stamp: str, body: bytes) -> str:
    """Return `sha256=` and the HMAC of `STAMP.BODY` in hexadecimal. stamp: seconds since 1970, as in the header X-Refract-Timestamp."""
    import hmac

    return "sha256=" + hmac.new(key.encode(), stamp.encode() + b"." + body, "sha256").hexdigest()
