"""Serving on a GPU: backends, hot swaps under load, replicas."""

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_data import COLOURS, encoded, write_bundle

from refract.models.bundle.bundle import Bundle, BundleError, load_bundle
from refract.serve.metrics import Metrics
from refract.serve.requests.limits import Limits
from refract.serve.runtime.backends.registry import BACKENDS
from refract.serve.runtime.engine import Compute, Engine, build
from refract.serve.runtime.selection import candidates
from refract.serve.runtime.service import Service
from refract.serve.runtime.staging import Staging

pytestmark = pytest.mark.gpu

GOLDEN = [encoded(label, number) for number in range(3) for label in COLOURS]
CHEAP = ("eager", "bf16")
"""Backends that are tested on a CPU. The others take long to convert."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    one, other = (load_bundle(write_bundle(root / str(seed), GOLDEN, seed=seed)) for seed in (0, 1))
    return one, other


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRACT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if "cuda" in backend.devices])
def test_a_backend_agrees_with_float32_on_the_golden_samples(
    name: str, bundles: tuple[Bundle, Bundle], device: str
) -> None:
    if name not in (CHEAP if device == "cpu" else candidates(torch.device(device))):
        pytest.skip(
            "tests/serve tests this backend on the CPU"
            if device == "cpu"
            else f"the server does not offer {name} on {device}"
        )
    engine = Engine(bundles[0], device, name)
    assert engine.self_test() > 0
    assert engine.predict(_batch(engine)).shape == (len(GOLDEN), len(COLOURS))


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if "cuda" not in backend.devices])
def test_a_cpu_backend_is_rejected_by_name(name: str, bundles: tuple[Bundle, Bundle], device: str) -> None:
    if device == "cpu":
        pytest.skip("these backends run on the CPU, so none is rejected")
    with pytest.raises(BundleError, match=f"--backend {name}"):
        Engine(bundles[0], device, name)


def test_auto_chooses_a_backend_that_agrees(bundles: tuple[Bundle, Bundle], device: str) -> None:
    if device == "cpu":
        pytest.skip("tests/serve/test_serve_selection.py tests the choice on the CPU")
    engine = Engine(bundles[0], device, "auto")
    assert engine.choice is not None and engine.choice.name in candidates(torch.device(device))
    assert engine.self_test() > 0


def test_two_replicas_give_the_same_answers(bundles: tuple[Bundle, Bundle], device: str) -> None:
    threads = torch.get_num_threads()
    engine = build(bundles[0], [device], replicas=2)
    torch.set_num_threads(threads)
    assert len(engine.workers) == (4 if device == "cuda" else 2), (
        "on a GPU each replica copies one batch while it computes another"
    )
    one, *others = (worker(_batch(engine)) for worker in engine.workers)
    for other in others:
        for name in ("probabilities", "embedding"):
            np.testing.assert_allclose(one[name], other[name], atol=1e-5)
    assert engine.devices[0] == engine.devices[1]


@pytest.mark.parametrize("name", ["eager", "cuda-graphs"])
def test_two_threads_that_share_a_gpu_get_their_own_answers(
    name: str, bundles: tuple[Bundle, Bundle], device: str
) -> None:
    if device == "cpu" and name == "cuda-graphs":
        pytest.skip("a CPU has no CUDA graphs")
    engine = Engine(bundles[0], device, name)
    rows = _batch(engine)
    expected = engine.predict(rows)

    def ask(worker: Compute, start: int) -> None:
        for count in (1, 2, 3, len(rows)) * 25:
            chosen = [(start + index) % len(rows) for index in range(count)]
            np.testing.assert_allclose(worker(rows[chosen])["probabilities"], expected[chosen], atol=0.02)

    workers = [partial(engine.overlapped, Staging(engine.device)) for _ in range(2)]
    with ThreadPoolExecutor(len(workers)) as pool:
        for done in [pool.submit(ask, worker, start) for start, worker in enumerate(workers)]:
            done.result()


def test_a_batch_that_does_not_fit_is_computed_in_parts(
    bundles: tuple[Bundle, Bundle], device: str, caplog: pytest.LogCaptureFixture
) -> None:
    if device == "cpu":
        pytest.skip("tests/serve/test_serve_gpu.py tests this on the CPU")
    engine = Engine(bundles[0], device)
    sample = _batch(engine)[:1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.get_device_properties(device).total_memory)
    try:
        answers = engine.workers[0](np.repeat(sample, 60_000, axis=0))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(answers) == 60_000 and "has too little memory for a batch of 60000" in caplog.text
    for name in ("probabilities", "logits", "embedding"):
        np.testing.assert_allclose(answers[name][-1], engine.compute(sample)[name][0], atol=1e-3)


def test_hot_swaps_under_load_answer_everything_and_free_the_memory(
    bundles: tuple[Bundle, Bundle], device: str
) -> None:
    swaps = 30 if device == "cuda" else 6
    memory: list[int] = []

    async def story() -> None:
        service = Service(Engine(bundles[0], device), limits=Limits(), metrics=Metrics())
        await service.start()
        batch, stop, answered = _batch(service.models.engine), asyncio.Event(), 0

        async def load() -> None:
            nonlocal answered
            while not stop.is_set():
                worker = service.models.champion
                with worker.in_flight_request():
                    result = await worker.submit(batch)
                assert np.isfinite(result.outputs["probabilities"]).all()
                answered += 1
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(load()) for _ in range(4)]
        for number in range(swaps):
            await service.models.swap(Engine(bundles[(number + 1) % 2], device))
            gc.collect()
            memory.append(torch.cuda.memory_allocated() if device == "cuda" else 0)
        stop.set()
        await asyncio.gather(*tasks)
        assert answered > swaps
        await service.stop()

    asyncio.run(story())
    half = len(memory) // 2
    size = sum(value.nbytes for value in bundles[0].classifier("cpu").state_dict().values())
    growth = max(memory[half:]) - max(memory[:half])
    assert growth <= 5 * size, "an engine that is not freed would add its size at each swap"


def _batch(engine: Engine) -> np.ndarray:
    return np.stack([engine.preprocess(data) for data in GOLDEN])
