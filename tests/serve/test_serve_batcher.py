"""The batcher, with plain functions as engines. Timeouts only bound a failing test."""

import asyncio
import threading
import time

import numpy as np
import pytest

from refract.serve.requests.limits import OverloadedError
from refract.serve.runtime.batcher import Batcher, BatchError, ClosedError


class Doubler:
    """Doubles its inputs and records the batches. A gate can hold it."""

    def __init__(self):
        self.batches, self.gate, self.entered = [], threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, batch):
        self.entered.set()
        assert self.gate.wait(20)
        self.batches.append(batch[:, 0].tolist())
        if (batch < 0).any():
            raise RuntimeError("negative")
        return batch * 2.0


def inputs(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]


def run(story, **options):
    """Run `story(batcher, doubler)` on a started batcher; returns the doubler after a clean stop."""

    async def main():
        doubler = Doubler()
        batcher = Batcher(doubler, **options)
        batcher.start()
        try:
            await asyncio.wait_for(story(batcher, doubler), 20)
        finally:
            doubler.gate.set()
            await batcher.stop()
        return doubler

    return asyncio.run(main())


async def hold(batcher, doubler) -> asyncio.Task:
    """Occupy the engine with one input until its gate opens."""
    doubler.gate.clear()
    task = asyncio.create_task(batcher.submit(inputs(0)))
    await asyncio.to_thread(doubler.entered.wait, 20)
    return task


async def enqueue(batcher, *values: float) -> asyncio.Task:
    task = asyncio.create_task(batcher.submit(inputs(*values)))
    await asyncio.sleep(0)  # lets the task reach its first await
    return task


def test_waiting_inputs_form_one_batch_and_each_gets_its_own_output():
    async def story(batcher, doubler):
        first = await hold(batcher, doubler)
        tasks = [await enqueue(batcher, i) for i in range(1, 6)]
        doubler.gate.set()
        assert [task.outputs[0, 0] for task in await asyncio.gather(first, *tasks)] == [0, 2, 4, 6, 8, 10]

    assert run(story, max_batch=4, max_wait_ms=0).batches == [[0], [1, 2, 3, 4], [5]]


def test_a_full_batch_starts_immediately():
    async def story(batcher, doubler):
        await asyncio.gather(batcher.submit(inputs(1)), batcher.submit(inputs(2)))

    assert run(story, max_batch=2, max_wait_ms=1_000_000).batches == [[1, 2]]


def test_a_single_input_starts_after_max_wait_ms():
    async def story(batcher, doubler):
        started = time.monotonic()
        await batcher.submit(inputs(3))
        assert time.monotonic() - started >= 0.3

    assert run(story, max_batch=2, max_wait_ms=300).batches == [[3]]


def test_a_batch_does_not_wait_if_no_input_is_in_preparation():
    on_the_way = [1]

    async def story(batcher, doubler):
        first = await enqueue(batcher, 1)
        assert not (await asyncio.wait({first}, timeout=0.1))[0], "another input is in preparation"
        on_the_way.clear()
        await batcher.submit(inputs(2))
        answered = await first
        assert 0.1 <= answered.queued < 20 and 0 <= answered.computed < 10
        await batcher.submit(inputs(3))

    assert run(story, max_wait_ms=60_000, coming=lambda: bool(on_the_way)).batches == [[1, 2], [3]]


def test_a_large_request_is_split_and_joined_in_order():
    async def story(batcher, doubler):
        assert (await batcher.submit(inputs(*range(10)))).outputs[:, 0].tolist() == [2.0 * i for i in range(10)]

    assert run(story, max_batch=4, max_wait_ms=0).batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_full_queue_accepts_all_inputs_of_a_request_or_none():
    async def story(batcher, doubler):
        first, waiting = await hold(batcher, doubler), await enqueue(batcher, 1, 2)
        with pytest.raises(OverloadedError, match="2 images wait already, of at most"):
            await batcher.submit(inputs(3, 4))
        last = await enqueue(batcher, 5)
        doubler.gate.set()
        await asyncio.gather(first, waiting, last)

    assert run(story, max_batch=8, max_wait_ms=0, max_queue=3).batches == [[0], [1, 2, 5]]


def test_an_exception_fails_its_own_batch_only():
    async def story(batcher, doubler):
        first, bad = await hold(batcher, doubler), await enqueue(batcher, -1, 1)
        good = await enqueue(batcher, 2, 3)
        doubler.gate.set()
        await first
        with pytest.raises(BatchError):
            await bad
        assert (await good).outputs[:, 0].tolist() == [4, 6]

    run(story, max_batch=2, max_wait_ms=0)


def test_a_wrong_number_of_outputs_fails_the_batch():
    async def story():
        batcher = Batcher(lambda batch: batch[:1], max_wait_ms=0)
        batcher.start()
        with pytest.raises(BatchError):
            await asyncio.wait_for(batcher.submit(inputs(1, 2)), 20)
        await batcher.stop()

    asyncio.run(story())


def test_cancelled_requests_are_skipped():
    async def story(batcher, doubler):
        first, gone, last = await hold(batcher, doubler), await enqueue(batcher, 1), await enqueue(batcher, 2)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        doubler.gate.set()
        await asyncio.gather(first, last)

    assert run(story, max_wait_ms=0).batches == [[0], [2]]


def test_stop_computes_accepted_inputs_and_rejects_new_ones(inference_threads):
    async def main():
        doubler = Doubler()
        batcher = Batcher(doubler, max_batch=2, max_wait_ms=60_000)
        batcher.start()
        tasks = [await enqueue(batcher, i) for i in (1, 2, 3)]  # 3 would wait for a minute
        await asyncio.wait_for(batcher.stop(), 20)
        assert [float((await task).outputs[0, 0]) for task in tasks] == [2, 4, 6]
        with pytest.raises(ClosedError, match="shutting down"):
            await batcher.submit(inputs(4))
        assert not inference_threads()

    asyncio.run(main())


@pytest.mark.parametrize(
    "options", [{"max_batch": 0}, {"max_queue": 0}, {"max_wait_ms": -1}, {"max_wait_ms": float("nan")}]
)
def test_invalid_settings_are_rejected(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Batcher(lambda batch: batch, **options)


def test_two_engines_compute_concurrently_and_divide_the_waiting_inputs(inference_threads) -> None:
    together = threading.Barrier(2, timeout=20)
    sizes: list[int] = []

    def engine(batch: np.ndarray) -> np.ndarray:
        together.wait()
        sizes.append(len(batch))
        return batch + 1

    async def main() -> None:
        batcher = Batcher(engine, engine, max_batch=8, max_wait_ms=0)
        batcher.start()
        results = await asyncio.gather(*(batcher.submit(inputs(k)) for k in range(8)))
        assert [float(answer.outputs[0, 0]) for answer in results] == [k + 1 for k in range(8)]
        await batcher.stop()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert sizes == [4, 4]
    assert not inference_threads()


def test_the_rest_of_a_started_batch_does_not_wait() -> None:
    """The first engine took its part of a full batch. The second one does not wait for its part to grow."""
    together = threading.Barrier(2, timeout=20)

    def engine(batch: np.ndarray) -> np.ndarray:
        together.wait()
        return batch

    async def main() -> None:
        batcher = Batcher(engine, engine, max_batch=8, max_wait_ms=60_000)
        batcher.start()
        await asyncio.gather(*(batcher.submit(inputs(k)) for k in range(8)))
        await batcher.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_the_event_loop_computes_all_waiting_inputs_with_several_engines() -> None:
    batches: list[int] = []

    def engine(batch: np.ndarray) -> np.ndarray:
        batches.append(len(batch))
        assert threading.current_thread() is threading.main_thread()
        return batch

    async def main() -> None:
        batcher = Batcher(engine, engine, engine, max_batch=8, brief=lambda: True, coming=lambda: False)
        batcher.start()
        await asyncio.gather(*(batcher.submit(inputs(k)) for k in range(12)))
        await batcher.stop()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert batches == [8, 4]


def test_a_thread_keeps_waiting_if_another_one_took_the_batch() -> None:
    """Both threads wait for the same batch to grow. One takes it, the other continues to wait."""

    async def main() -> None:
        batcher = Batcher(lambda batch: batch, lambda batch: batch, max_batch=4, max_wait_ms=20)
        batcher.start()
        for k in range(20):
            assert float((await batcher.submit(inputs(k))).outputs[0, 0]) == k
        await batcher.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_an_idle_thread_takes_inputs_while_another_computes() -> None:
    """The first thread waited for its batch to grow, and computes it. The other one must be woken for the next input."""
    first, resume = threading.Event(), threading.Event()

    def engine(batch: np.ndarray) -> np.ndarray:
        if batch[0, 0] == 1:
            first.set()
            assert resume.wait(20)
        return batch

    async def main() -> None:
        batcher = Batcher(engine, engine, max_batch=4, max_wait_ms=50)
        batcher.start()
        await batcher.submit(inputs(0))  # both threads have been asleep, and one has waited for more
        slow = asyncio.create_task(batcher.submit(inputs(1)))
        await asyncio.to_thread(first.wait, 20)
        for _ in range(5):
            await asyncio.wait_for(batcher.submit(inputs(2)), 10)
        resume.set()
        await slow
        await batcher.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_the_wait_is_measured_from_the_first_input_of_a_batch() -> None:
    async def story(batcher, doubler):
        tasks = [await enqueue(batcher, 0)]
        while not tasks[0].done():
            assert len(tasks) < 500, "each input prolongs the wait"
            await asyncio.sleep(0.02)
            tasks.append(await enqueue(batcher, 1))
        assert tasks[0].result().queued >= 0.3
        await asyncio.gather(*tasks)

    run(story, max_batch=2000, max_wait_ms=300)


def test_the_event_loop_computes_brief_batches_unless_a_thread_computes() -> None:
    seen: list[tuple[list[float], bool]] = []
    brief, entered, resume = [True], threading.Event(), threading.Event()

    def engine(batch: np.ndarray) -> np.ndarray:
        on_main_thread = threading.current_thread() is threading.main_thread()
        seen.append((batch[:, 0].tolist(), on_main_thread))
        if (batch == 7).any():
            entered.set()
            assert resume.wait(20)
        if (batch < 0).any():
            raise RuntimeError("negative")
        return batch * 2

    async def main() -> None:
        batcher = Batcher(engine, max_batch=4, coming=lambda: False, brief=lambda: brief[0])
        batcher.start()
        answers = await asyncio.gather(*(batcher.submit(inputs(value)) for value in range(6)))
        assert [float(one.outputs[0, 0]) for one in answers] == [0, 2, 4, 6, 8, 10]
        assert seen == [([0, 1, 2, 3], True), ([4, 5], True)], "inputs submitted together, in batches"
        with pytest.raises(BatchError):
            await batcher.submit(inputs(-1))
        brief[0] = False
        slow = asyncio.create_task(batcher.submit(inputs(7)))
        await asyncio.to_thread(entered.wait, 20)
        brief[0] = True
        after = asyncio.create_task(batcher.submit(inputs(8)))
        await asyncio.sleep(0.05)
        resume.set()
        await asyncio.gather(slow, after)
        assert seen[-2:] == [([7], False), ([8], False)], "an engine computes one batch at a time"
        await batcher.submit(inputs(9))
        assert seen[-1] == ([9], True)
        await batcher.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_the_event_loop_waits_for_inputs_in_preparation() -> None:
    coming = [True]

    async def main() -> None:
        doubler = Doubler()
        batcher = Batcher(doubler, max_wait_ms=60_000, coming=lambda: coming[0], brief=lambda: True)
        batcher.start()
        first = await enqueue(batcher, 1)
        await asyncio.sleep(0.05)
        assert not doubler.batches
        coming[0] = False
        second = await enqueue(batcher, 2)
        await asyncio.gather(first, second)
        assert doubler.batches == [[1, 2]]
        await batcher.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_each_engine_takes_its_part_of_a_full_batch_at_once_and_what_follows_waits_again():
    """The inputs still to come would hold a part of two for max_wait_ms; it belongs to a batch that may start."""

    async def story(batcher, coming):
        await asyncio.wait_for(batcher.submit(inputs(1, 2, 3, 4)), 15)
        first = await enqueue(batcher, 5)
        await asyncio.sleep(0.05)  # in which a thread that does not wait would take it
        await asyncio.wait_for(batcher.submit(inputs(6, 7, 8)), 15)
        await first

    async def main():
        engines = [Doubler(), Doubler()]
        batcher = Batcher(*engines, max_batch=4, max_wait_ms=60_000, coming=lambda: True)
        batcher.start()
        try:
            await story(batcher, engines)
        finally:
            await batcher.stop()
        return [batch for engine in engines for batch in engine.batches]

    batches = asyncio.run(main())
    assert sorted(value for batch in batches for value in batch) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [1, 2] in batches and [5, 6] in batches, "5 waited for a full batch of its own"
