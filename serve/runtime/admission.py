"""Admission slots: how many requests are in flight, and how long an accepted one may be expected to wait."""

from collections.abc import Iterator
from contextlib import contextmanager

from refract.serve.requests.limits import OverloadedError

PATIENCE = 0.5
"""The fraction of the deadline that an accepted request may be expected to wait. The rest covers errors of that estimate."""


class Admission:
    """Counts the requests in flight, at most `max_requests`, and rejects those that would miss the deadline. Use it on one event loop
    only. in_flight: the number of requests in flight."""

    def __init__(self, max_requests: int, deadline_s: float) -> None:
        self.max_requests, self._longest_wait = max_requests, PATIENCE * deadline_s
        self.in_flight = 0

    def check_wait(self, expected: float) -> None:
        """Raise OverloadedError if a request that is expected to take `expected` seconds would miss its deadline. To start it would delay
        the others too."""
        if expected > self._longest_wait:
            raise OverloadedError(
                f"the response would take about {expected:.1f} s; try again later", round(expected) or 1
            )

    @contextmanager
    def slot(self, expected: float) -> Iterator[None]:
        """Hold an admission slot until the block ends. expected: the seconds that the request is expected to take. OverloadedError if all
        slots are taken, or if the wait is too long."""
        if self.in_flight >= self.max_requests:
            raise OverloadedError(f"{self.in_flight} requests are in flight, the most allowed; try again later")
        self.check_wait(expected)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
