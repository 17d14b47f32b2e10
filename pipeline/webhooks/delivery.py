"""Send one event over HTTP: a POST of JSON, signed with HMAC-SHA256 if REFRACT_WEBHOOK_SECRET is set. No redirect is followed."""

import hashlib
import hmac
import os
import urllib.error
import urllib.request
from datetime import datetime
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from refract.models.credentials import masked

URL, SECRET = "REFRACT_WEBHOOK_URL", "REFRACT_WEBHOOK_SECRET"
"""Environment variables: the address instead of the config's, and the key of the signature."""

TIMEOUT_S = 5.0
"""The longest wait in seconds for a connection, or for the next part of a response."""

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
    if not valid or any(character.isspace() or ord(character) < 32 for character in url):
        return "an address such as https://example.com/hook"
    if parts.username is not None:
        return "an address without a user name and a password; check the signature instead"
    if stored and masked(url) != url:
        return f"an address without a token; set the whole address as {URL}"
    return None


def send(url: str, event: str, body: bytes, now: datetime) -> None:
    """Send the body, and return when the server has accepted it with a status 2xx. NotDelivered otherwise.

    event: the ID of the event, so that the receiver can ignore a second delivery.
    """
    stamp = str(int(now.timestamp()))
    headers = {
        "Content-Type": "application/json; charset=utf-8",
        "User-Agent": "refract",
        "X-Refract-Event": event,
        "X-Refract-Timestamp": stamp,
    }
    if key := os.environ.get(SECRET):
        headers["X-Refract-Signature"] = signature(key, stamp, body)
    host = urlsplit(url).hostname
    try:
        request = urllib.request.Request(url, body, headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        error.close()
        refused = error.code < 500 and error.code not in TRANSIENT
        raise NotDelivered(f"{host} responded with status {error.code}", refused=refused) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise NotDelivered(f"{host}: {reason}", refused=False) from error


def signature(key: str, stamp: str, body: bytes) -> str:
    """Return `sha256=` and the HMAC of `STAMP.BODY` in hexadecimal. stamp: seconds since 1970, as in the header X-Refract-Timestamp."""
    return "sha256=" + hmac.new(key.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Treats a redirect as a refusal: a POST that follows it would become a GET without the event."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None
