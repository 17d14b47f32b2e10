"""GPU features of the server that a CPU can test: buffers, out-of-memory errors, reports."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import generate_latest

from refract.models.bundle.bundle import BundleError
from refract.serve.cli import command
from refract.serve.http.app import create_app
from refract.serve.runtime import engine as engines
from refract.serve.runtime import gpus
from refract.serve.runtime.backends.cuda_graphs import padded
from refract.serve.runtime.backends.registry import BACKENDS
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.staging import Staging

GPU = gpus.Gpu("cuda:0", "NVIDIA H100 80GB HBM3", "580.82.07", 80 << 30, 70 << 30, 5 << 30)


class Small:
    """A network on a device whose memory fits `most` samples."""

    def __init__(self, forward, most: int, error: Exception) -> None:
        self.forward, self.most, self.error, self.batches = forward, most, error, list[int]()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.most:
            raise self.error
        self.batches.append(len(images))
        return self.forward(images)


def assert_close(outputs: np.ndarray, expected: np.ndarray) -> None:
    for name in ("probabilities", "logits", "embedding"):
        np.testing.assert_allclose(outputs[name], expected[name], atol=1e-5)


def images_of(engine: Engine, make_image, count: int) -> np.ndarray:
    return np.stack([engine.preprocess(make_image(number)) for number in range(count)])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling")]
)
def test_a_batch_that_exceeds_the_memory_is_split(
    error: Exception, bundle, make_image, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(bundle)
    images = images_of(engine, make_image, 7)
    expected = engine.compute(images)
    small = Small(engine._forward, 2, error)
    engine._forward = small
    for worker in (engine.compute, partial(engine.overlapped, Staging(engine.device))):
        assert_close(worker(images), expected)
    assert max(small.batches) <= 2 and "too little memory for a batch of 7; using batches of 3 for" in caplog.text
    caplog.clear()
    engine.compute(images)
    assert not caplog.text, "the size that fits is stored"
    small.most, small.batches = 7, []
    engine.compute(images)
    assert max(small.batches) == 1, "until larger ones are tried again"
    monkeypatch.setattr(engine, "_retry_at", 0.0)
    engine.compute(images)
    assert max(small.batches) == 7


def test_other_errors_and_a_single_sample_that_exceeds_the_memory_are_raised(bundle, make_image) -> None:
    engine = Engine(bundle)
    images = images_of(engine, make_image, 3)
    for most, error in (
        (2, RuntimeError("a shape that no network takes")),
        (0, torch.OutOfMemoryError("CUDA out of memory")),
    ):
        engine._forward = Small(engine._network, most, error)
        with pytest.raises(RuntimeError) as raised:
            engine.compute(images)
        assert raised.value is error


def test_warm_up_computes_each_batch_size_and_reports_too_little_memory(bundle) -> None:
    engine = Engine(bundle)
    small = Small(engine._forward, 100, torch.OutOfMemoryError("CUDA out of memory"))
    engine._forward = small
    engine.warm_up(12)
    assert small.batches == [1, 2, 4, 8, 12]
    small.most = 0
    with pytest.raises(BundleError, match="cpu has too little memory for one sample: .* choose another --device"):
        engine.warm_up(12)


def test_two_threads_share_a_device_without_mixing_their_batches(bundle, make_image) -> None:
    engine = Engine(bundle)
    images = images_of(engine, make_image, 6)
    expected = engine.compute(images)
    together = threading.Barrier(2)

    def ask(place: int) -> None:
        worker = partial(engine.overlapped, Staging(engine.device))
        for count in (1, 3, 2, 6, 1) * 4:
            together.wait(30)
            rows = [(place + number) % 6 for number in range(count)]
            assert_close(worker(images[rows]), expected[rows])

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(ask, place) for place in range(2)]:
            done.result()


def test_batches_are_padded_to_powers_of_two() -> None:
    assert [padded(count) for count in (1, 2, 3, 4, 5, 8, 9, 200)] == [1, 2, 4, 4, 8, 8, 16, 256]


def test_a_missing_backend_is_rejected_with_its_package(bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = BACKENDS["tensorrt"].missing()
    assert (
        reason == "needs the package torch_tensorrt: pip install torch-tensorrt, in the version of the installed torch"
    )
    with pytest.raises(BundleError, match="--backend tensorrt runs on cuda, not on cpu; use one of auto, eager, bf16"):
        Engine(bundle, backend="tensorrt")
    assert not BACKENDS["tensorrt"].offered(torch.device("cuda"))


def test_gpus_are_reported_with_driver_and_memory(bundle, serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refract.serve.http.app.describe", lambda devices: [GPU])
    app = create_app(bundle)
    with serving(app) as client:
        assert client.get("/v1/model").json()["gpus"] == [GPU._asdict()]
    lines = generate_latest(app.state.service.metrics.registry).decode().splitlines()
    assert 'refract_gpu{device="cuda:0",driver="580.82.07",name="NVIDIA H100 80GB HBM3"} 1.0' in lines
    measured = [line.rpartition(" ") for line in lines if line.startswith("refract_gpu_bytes{")]
    kinds = {labels: float(value) for labels, _, value in measured}
    assert kinds == {
        f'refract_gpu_bytes{{device="cuda:0",kind="{kind}"}}': getattr(GPU, kind)
        for kind in ("total", "free", "allocated")
    }


def test_the_driver_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(gpus, "DRIVER", file)
    assert gpus.driver_version() is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (root@host)\nGCC version: gcc 12.2.0\n"
    )
    assert gpus.driver_version() == "580.82.07"


def test_the_reason_is_logged_if_pytorch_finds_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert command._devices("auto") == ["cpu"] and not caplog.text, "a machine without a GPU"
    (tmp_path / "version").write_text("NVRM version: 580.82.07")
    assert command._devices("auto") == ["cpu"]
    assert "runs on the CPU, as PyTorch sees no GPU: a container sees GPUs with `docker run --gpus all`" in caplog.text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(
        command.InvalidOptionError,
        match="--device cuda: device 'cuda:0' is not available; .* .CUDA_VISIBLE_DEVICES is ''",
    ):
        command._devices("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(command.InvalidOptionError, match="built without CUDA"):
        command._devices("all")


def test_too_little_memory_for_the_network_is_reported(bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engines.Bundle, "classifier", full)
    with pytest.raises(BundleError, match="cpu has too little memory for this network: its memory is full"):
        Engine(bundle)
