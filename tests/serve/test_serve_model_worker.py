"""A model worker estimates its waiting time, and rejects requests that would miss their deadline."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
import torch

from refract.serve.requests.limits import Budget, Limits, OverloadedError
from refract.serve.requests.protocols import InferBody
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.model_worker import ModelWorker
from refract.serve.runtime.outputs import unpacked
from refract.serve.runtime.pools import DecoderPools, PricedPool
from refract.serve.runtime.service import Service
from refract.serve.runtime.settings import ServiceSettings
from refract.serve.runtime.work import Work


class Paced(Engine):
    """Reports a pace of a tenth of a second an image, and computes only while its gate is open."""

    def __init__(self, bundle):
        super().__init__(bundle)
        self.entered, self.gate = threading.Event(), threading.Event()

    def self_test(self):
        return 0.1

    def compute(self, batch):
        self.entered.set()
        assert self.gate.wait(20)
        return super().compute(batch)


def batch(count: int) -> np.ndarray:
    return np.zeros((count, 32, 32, 3), np.uint8)


def with_worker(bundle, story) -> None:
    async def main() -> None:
        engine, threads = Paced(bundle), PricedPool(1, "test", pace=1)
        worker = ModelWorker(
            engine,
            settings=ServiceSettings(max_wait_ms=0),
            decoders=DecoderPools(threads, threads),
            budget=Budget(Limits()),
            metrics=None,
        )
        worker.start(engine.self_test())
        try:
            await asyncio.wait_for(story(worker, engine), 20)
        finally:
            engine.gate.set()
            await worker.retire()

    asyncio.run(main())


def test_the_expected_wait_includes_the_current_batch(bundle) -> None:
    async def story(worker: ModelWorker, engine: Paced) -> None:
        first = asyncio.create_task(worker.submit(batch(20)))
        await asyncio.to_thread(engine.entered.wait, 20)
        assert not worker.waiting and worker.expected() == pytest.approx(2.0)
        second = asyncio.create_task(worker.submit(batch(5)))
        await asyncio.sleep(0)
        assert worker.expected(3) == pytest.approx(2.8)
        engine.gate.set()
        await asyncio.gather(first, second)
        assert worker.expected() == 0

    with_worker(bundle, story)


def test_a_large_batch_updates_the_pace_at_once(bundle) -> None:
    async def story(worker: ModelWorker, engine: Paced) -> None:
        engine.gate.set()
        await worker.submit(batch(32))
        assert worker.expected(1) < 0.02, "the initial pace has no more weight"

    with_worker(bundle, story)


@pytest.mark.parametrize(
    ("busy_s", "device", "moves"), [(0.0, "cpu", True), (0.003, "cpu", False), (0.0, "meta", False)]
)
def test_proven_brief_batches_are_computed_on_the_event_loop(
    bundle, monkeypatch: pytest.MonkeyPatch, busy_s: float, device: str, moves: bool
) -> None:
    """meta stands for a device whose computing time is not the thread's CPU time."""
    seen: list[bool] = []

    def compute(batch: np.ndarray) -> np.ndarray:
        end = time.thread_time() + busy_s
        while time.thread_time() < end:
            pass
        seen.append(threading.current_thread() is threading.main_thread())
        return unpacked(np.zeros((len(batch), 21), np.float32), 10)

    async def story(worker: ModelWorker, engine: Paced) -> None:
        monkeypatch.setattr(engine, "device", torch.device(device))
        for _ in range(12):
            await worker.submit(batch(1))
        assert seen == [False] * 8 + [moves] * 4

    monkeypatch.setattr("refract.serve.runtime.model_worker.PROVEN", 8)
    monkeypatch.setattr(Paced, "compute", lambda self, batch: compute(batch))
    with_worker(bundle, story)


def asking(count: int) -> Work:
    """A request of `count` black images, which is parsed on the event loop."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": [count, 32, 32, 3]}
    pixels = batch(count).tobytes()
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(pixels)}}]}).encode()
    return Work(InferBody(head + pixels, str(len(head))), quick=True)


@contextlib.asynccontextmanager
async def busy(service: Service, engine: Paced, *counts: int) -> AsyncIterator[None]:
    """The first request is at the engine, the others wait. They are answered when the block ends."""
    tasks = [asyncio.create_task(service.predict(asking(counts[0])))]
    await asyncio.to_thread(engine.entered.wait, 20)
    tasks += [asyncio.create_task(service.predict(asking(count))) for count in counts[1:]]
    await asyncio.sleep(0.01)
    try:
        yield
    finally:
        engine.gate.set()
        await asyncio.gather(*tasks)


def test_a_large_request_that_would_miss_its_deadline_does_not_enter_the_queue(bundle, served) -> None:
    engine = Paced(bundle)

    async def story(service: Service) -> None:
        async with busy(service, engine, 1, 1):
            with pytest.raises(OverloadedError, match=r"would take about 6\.6 s"):
                await asyncio.wait_for(service.predict(asking(64)), 2)

    served(engine, story)


def test_a_body_that_arrives_when_the_queue_is_too_long_is_not_parsed(bundle, served) -> None:
    engine = Paced(bundle)

    async def story(service: Service) -> None:
        async with busy(service, engine, 1, 55):
            with pytest.raises(OverloadedError, match=r"would take about 5\.6 s"):
                await asyncio.wait_for(service.predict(Work(InferBody(b"invalid", None), quick=True)), 2)

    served(engine, story)
