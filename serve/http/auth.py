"""API keys of requests and their rate limit."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

from fastapi import Request

from refract.api_keys import Key, KeyFile, sent_key
from refract.serve.errors import RequestError
from refract.serve.requests.limits import OverloadedError


class ApiKeys:
    """The API keys of a file, see `KeyFile`, whose names are in the access log.

    rate: requests per second of each key, above which it receives 429; None for no limit. description: names the keys in error messages.
    Raises OSError or ValueError for an invalid file.
    """

    def __init__(
        self,
        file: Path,
        *,
        rate: float | None = None,
        description: str = "this server's keys",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file, self._rate, self._description, self._clock = KeyFile(file, clock=clock), rate, description, clock
        self._buckets: dict[Key, tuple[float, float]] = {}

    async def check(self, request: Request) -> None:
        """Check the key of `Authorization: Bearer KEY` or `X-API-Key: KEY`. Raises RequestError 401 unless the file holds it, and
        OverloadedError above the rate.

        It never waits. It is a coroutine because FastAPI would run a plain function on a thread."""
        key = self.find(request.headers.get("authorization", ""), request.headers.get("x-api-key", ""))
        request.state.key = key.name
        self.take_token(key)

    def find(self, authorization: str, x_api_key: str) -> Key:
        """Return the key that a request sent in these two header fields, empty texts without one. RequestError 401 as in `check`."""
        sent = sent_key(authorization, x_api_key)
        key = self._file.find(sent)
        if key is None:
            reason = f"the API key is not one of {self._description}" if sent else "this server requires an API key"
            raise RequestError(401, "unauthorized", f"{reason}; send the header Authorization: Bearer KEY")
        return key

    def unrated(self) -> "ApiKeys":
        """Return the same keys without their rate limit, for requests other than predictions: the web page polls the status every few
        seconds, which must not use up the rate of its key."""
        keys = copy.copy(self)
        keys._rate = None
        return keys

    def take_token(self, key: Key) -> None:
        """Take a token from the bucket of `key`, which holds one second's requests and refills at the rate. OverloadedError without one."""
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
