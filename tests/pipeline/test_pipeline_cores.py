"""Work in threads: results in order, a bounded number ahead, errors, and work that nobody wants any more."""

import threading
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refract.cores import AHEAD, TASK, mapped


@given(st.integers(0, 300), st.integers(1, 5), st.booleans())
def test_results_come_in_order_for_any_number_of_items_and_threads(count: int, threads: int, sized: bool) -> None:
    items = range(count) if sized else iter(range(count))
    assert list(mapped(lambda item: item * item, items, threads=threads)) == [item * item for item in range(count)]


def test_few_items_are_taken_ahead_of_the_results() -> None:
    taken: list[int] = []

    def source():
        for item in range(10_000):
            taken.append(item)
            yield item

    results = mapped(lambda item: item, source(), threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(taken) <= (AHEAD * 2 + 1) * TASK
    results.close()


def test_few_large_items_are_divided_among_the_threads() -> None:
    together = threading.Barrier(2, timeout=20)  # broken if one thread gets both items
    assert list(mapped(lambda item: (together.wait(), item)[1], [1, 2], threads=2)) == [1, 2]


def test_an_error_is_raised_in_place_of_its_result_and_no_further_work_starts() -> None:
    done: list[int] = []

    def work(item: int) -> int:
        if item == 40:
            raise ValueError("item 40")
        time.sleep(0)
        done.append(item)
        return item

    with pytest.raises(ValueError, match="item 40"):
        list(mapped(work, range(100_000), threads=2))
    assert len(done) <= (AHEAD * 2 + 4) * TASK


def test_the_memory_does_not_grow_with_the_number_of_items() -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        total = sum(mapped(lambda item: 1, range(count), threads=2))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert total == count
        return size

    peak(100)
    assert peak(50_000) < 2 * peak(5_000)
