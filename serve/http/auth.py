"""API keys and their rate limit."""

import hashlib
import hmac
import logging
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

from fastapi import Request

from refract.serve.http.errors import RequestError
from refract.serve.requests.limits import OverloadedError

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
"""Seconds between two checks whether the file of keys changed."""

MIN_KEY_CHARS = 8
"""Shortest key, in characters. A shorter one can be guessed, and is more likely a mistake in the file."""

_COMMENT = re.compile(r"(?:^|\s)#")


class ApiKeys:
    """The API keys of a file, one per line. The file is read again when it changes, so that keys are rotated without a restart. The text
    after a `#` at the start of a line or after white space names the key in logs; without it, the first 8 hex digits of its SHA-256 do.

    rate: requests per second of each key, above which it receives 429; None for no limit. description: names the keys in error messages.
    Raises OSError or ValueError for a file that cannot be read, has no key, or has a key shorter than MIN_KEY_CHARS or with non-ASCII
    characters, which no header carries safely. If a changed file is invalid, the previous keys stay valid and a warning is logged.
    """

    def __init__(
        self,
        file: Path,
        *,
        rate: float | None = None,
        description: str = "this server's keys",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file, self._rate, self._description, self._clock = file, rate, description, clock
        self._keys, self._stamp = self._read()
        self._checked_at, self._logged_error = clock(), ""
        self._buckets: dict[bytes, tuple[float, float]] = {}

    async def check(self, request: Request) -> None:
        """Check the key of `Authorization: Bearer KEY` or `X-API-Key: KEY`. Raises RequestError 401 unless the file holds it, and
        OverloadedError above the rate.

        It never waits. It is a coroutine because FastAPI would run a plain function on a thread."""
        self._reload_if_changed()
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        sent_key = (bearer if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")).strip().encode()
        # Every key is compared, each in constant time, so that the duration reveals no part of a key.
        matches = [key for key in self._keys if hmac.compare_digest(key, sent_key)]
        if not matches:
            reason = f"the API key is not one of {self._description}" if sent_key else "this server requires an API key"
            raise RequestError(401, "unauthorized", f"{reason}; send the header Authorization: Bearer KEY")
        request.state.key = self._keys[matches[0]]
        self._take_token(matches[0])

    def _take_token(self, key: bytes) -> None:
        """Take a token from the bucket of `key`, which holds one second's requests and refills at the rate."""
        if self._rate is None:
            return
        now, capacity = self._clock(), max(1.0, self._rate)
        tokens, since = self._buckets.get(key, (capacity, now))
        tokens = min(capacity, tokens + (now - since) * self._rate)
        if tokens < 1:
            self._buckets[key] = (tokens, now)
            message = f"more than {self._rate:g} requests per second with this key; try again later"
            raise OverloadedError(message, math.ceil((1 - tokens) / self._rate), "rate_limited")
        self._buckets[key] = (tokens - 1, now)

    def _reload_if_changed(self) -> None:
        if self._clock() - self._checked_at < CHECK_INTERVAL_S:
            return
        self._checked_at = self._clock()
        try:
            if _stamp(self._file) != self._stamp:
                self._keys, self._stamp = self._read()
                self._buckets = {key: bucket for key, bucket in self._buckets.items() if key in self._keys}
        except (OSError, ValueError) as err:  # being replaced, or invalid: the previous keys stay valid
            if str(err) != self._logged_error:
                logger.warning("the changed file of API keys is ignored, the previous keys stay valid: %s", err)
            self._logged_error = str(err)
        else:
            self._logged_error = ""

    def _read(self) -> tuple[dict[bytes, str], tuple[int, ...]]:
        stamp = _stamp(self._file)
        keys: dict[bytes, str] = {}
        for number, line in enumerate(self._file.read_text("utf-8-sig").splitlines(), 1):
            text, *comment = (part.strip() for part in _COMMENT.split(line, maxsplit=1))
            if 0 < len(text) < MIN_KEY_CHARS:
                raise ValueError(
                    f"{self._file}: line {number}: an API key must have at least {MIN_KEY_CHARS} characters"
                )
            if not text.isascii():
                raise ValueError(f"{self._file}: line {number}: an API key must have ASCII characters only")
            if text:
                key = text.encode()
                keys[key] = "".join(comment) or hashlib.sha256(key).hexdigest()[:8]
        if not keys:
            raise ValueError(f"{self._file}: the file has no API key; write one per line")
        return keys, stamp


def _stamp(file: Path) -> tuple[int, ...]:
    """Return a value that changes when the file is written or replaced, even if its modification time is preserved."""
    status = file.stat()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size
