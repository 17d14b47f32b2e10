"""Thread pools that estimate how long their queued work will take."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")

RECENT = 0.2
"""Weight of one unit of work in the moving average of the pace."""


DECODING = 0.01
"""Initial estimate of the seconds to decode one megapixel, until it is measured."""

LARGE = 16.0
"""Megapixels above which a request is decoded in a separate thread pool, with half as many threads as cores. Ordinary photos do not wait
for such requests."""


class PricedPool:
    """A pool of `count` threads that estimates the time until a job is done. pace: seconds for a unit of work, at first; then it is
    measured. Use it on one event loop only."""

    def __init__(self, count: int, name: str, *, pace: float) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._count, self._pace, self._held = count, pace, 0.0

    def expected(self, amount: float) -> float:
        """The seconds until `amount` more units are done, after all reserved work. 0 if no work is reserved: idle threads accept every
        job."""
        return (self._held + amount) * self._pace / self._count if self._held else 0.0

    @contextmanager
    def reserved(self, amount: float) -> Iterator[None]:
        """Count `amount` units as queued work until the block ends."""
        self._held += amount
        try:
            yield
        finally:
            self._held -= amount
            if self._held < 1e-9:  # rounding errors remain in sums of fractions
                self._held = 0.0

    async def run(self, amount: float, call: Callable[[], Result]) -> Result:
        """Run `call`, which does `amount` units of work, on one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._timed, amount, call)

    def close(self) -> None:
        """Stop the threads, and cancel jobs that have not started."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _timed(self, amount: float, call: Callable[[], Result]) -> Result:
        start = time.monotonic()
        result = call()
        # A large job measures the pace better, so it counts as `amount` units. A failed job is not measured.
        weight = 1 - (1 - RECENT) ** amount
        self._pace += weight * ((time.monotonic() - start) / amount - self._pace)
        return result


class DecoderPools:
    """The pools that decode images: one for ordinary requests, one for those above LARGE megapixels."""

    def __init__(self, ordinary: PricedPool, large: PricedPool) -> None:
        self._ordinary, self._large = ordinary, large

    def of(self, megapixels: float) -> PricedPool:
        """Return the pool for a request of that many megapixels."""
        return self._large if megapixels > LARGE else self._ordinary

    def close(self) -> None:
        """Stop the threads, and cancel jobs that have not started."""
        self._ordinary.close()
        self._large.close()
