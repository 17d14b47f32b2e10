"""Who may ask, and how often. Knows nothing of what is asked."""

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

LOOK_AGAIN_S = 1.0
SHORTEST = 8
"""Characters of a key: a shorter one is sooner a mistake in the file, and can be guessed."""

_REMARK = re.compile(r"(?:^|\s)#")


class ApiKeys:
    """The keys of a file, one a line, read again when the file changes, so that keys are rotated without a restart. What follows a `#`, at
    the beginning or after white space, is the key's name in logs; else the beginning of its SHA-256 is.

    rate: requests a second of each key, over which it gets 429; None for no limit; told: what a refusal calls them. OSError or ValueError
    for a file that cannot be read, holds none, or one of less than SHORTEST characters or of others than ASCII, which no header carries
    safely; later on the keys read last stay, and the log tells it.
    """

    def __init__(
        self,
        file: Path,
        *,
        rate: float | None = None,
        told: str = "this server's keys",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file, self._rate, self._told, self._clock = file, rate, told, clock
        self._keys, self._stamp = self._read()
        self._looked, self._trouble = clock(), ""
        self._buckets: dict[bytes, tuple[float, float]] = {}

    async def check(self, request: Request) -> None:
        """RequestError 401 without a key of the file, as `Authorization: Bearer KEY` or `X-API-Key: KEY`; OverloadedError beyond the rate.

        It waits for nothing; as a plain function FastAPI would run it on a thread."""
        self._look_again()
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = (bearer if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")).strip().encode()
        # All are compared, and each in a time that does not tell how much of it was right.
        known = [key for key in self._keys if hmac.compare_digest(key, given)]
        if not known:
            told = f"the key that was sent is not one of {self._told}" if given else "this server asks for a key"
            raise RequestError(401, "unauthorized", f"{told}: send Authorization: Bearer KEY")
        request.state.key = self._keys[known[0]]
        self._take(known[0])

    def _take(self, key: bytes) -> None:
        if self._rate is None:
            return
        now, most = self._clock(), max(1.0, self._rate)
        left, since = self._buckets.get(key, (most, now))
        left = min(most, left + (now - since) * self._rate)
        if left < 1:
            self._buckets[key] = (left, now)
            told = f"more than {self._rate:g} requests a second with this key"
            raise OverloadedError(told, math.ceil((1 - left) / self._rate), "rate_limited")
        self._buckets[key] = (left - 1, now)

    def _look_again(self) -> None:
        if self._clock() - self._looked < LOOK_AGAIN_S:
            return
        self._looked = self._clock()
        try:
            if _stamp(self._file) != self._stamp:
                self._keys, self._stamp = self._read()
                self._buckets = {key: bucket for key, bucket in self._buckets.items() if key in self._keys}
        except (OSError, ValueError) as err:  # being replaced, or wrong: those that were good stay
            if str(err) != self._trouble:
                logger.warning("the keys stay as they were: %s", err)
            self._trouble = str(err)
        else:
            self._trouble = ""

    def _read(self) -> tuple[dict[bytes, str], tuple[int, ...]]:
        stamp = _stamp(self._file)
        keys: dict[bytes, str] = {}
        for number, line in enumerate(self._file.read_text("utf-8-sig").splitlines(), 1):
            text, *remark = (part.strip() for part in _REMARK.split(line, maxsplit=1))
            if 0 < len(text) < SHORTEST:
                raise ValueError(f"{self._file}: line {number}: a key has at least {SHORTEST} characters")
            if not text.isascii():
                raise ValueError(f"{self._file}: line {number}: a key has letters, digits and signs of ASCII alone")
            if text:
                key = text.encode()
                keys[key] = "".join(remark) or hashlib.sha256(key).hexdigest()[:8]
        if not keys:
            raise ValueError(f"{self._file}: holds no key")
        return keys, stamp


def _stamp(file: Path) -> tuple[int, ...]:
    """Another where the file was written or replaced, with its times kept too."""
    found = file.stat()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size
