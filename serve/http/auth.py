"""API keys of requests and their rate limit."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from fastapi import Request

from refract.api_keys import Key, KeyFile, sent_key
from refract.serve.http.errors import RequestError
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
        sent = sent_key(request.headers.get("authorization", ""), request.headers.get("x-api-key", ""))
        key = self._file.find(sent)
        if key is None:
            reason = f"the API key is not one of {self._description}" if sent else "this server requires an API key"
            raise RequestError(401, "unauthorized", f"{reason}; send the header Authorization: Bearer KEY")
        request.state.key = key.name
        self._take_token(key)

    def _take_token(self, key: Key) -> None:
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
