"""Threads whose work has a price: how long what waits for them will take. Knows nothing of images."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")

RECENT = 0.2
"""How much a unit of work counts in the mean of the past ones."""


class PricedPool:
    """`count` threads, and the seconds that a unit of their work takes: `pace` at first, then as measured. Belongs to one event loop."""

    def __init__(self, count: int, name: str, *, pace: float) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._count, self._pace, self._held = count, pace, 0.0

    def expected(self, amount: float) -> float:
        """Seconds until so much more will be done, after what was promised before it; 0 where nothing was, as it can only begin then."""
        return (self._held + amount) * self._pace / self._count if self._held else 0.0

    @contextmanager
    def promised(self, amount: float) -> Iterator[None]:
        """So much is to be done, until the block ends."""
        self._held += amount
        try:
            yield
        finally:
            self._held -= amount
            if self._held < 1e-9:  # sums of fractions leave something over
                self._held = 0.0

    async def run(self, amount: float, call: Callable[[], Result]) -> Result:
        """`call`, whose work is of this amount, on one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._timed, amount, call)

    def close(self) -> None:
        """End them; what has not begun never does."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _timed(self, amount: float, call: Callable[[], Result]) -> Result:
        began = time.monotonic()
        found = call()
        # Much work tells more of the pace than little, and counts as so many units. What failed tells nothing.
        share = 1 - (1 - RECENT) ** amount
        self._pace += share * ((time.monotonic() - began) / amount - self._pace)
        return found
