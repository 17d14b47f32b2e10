"""A small bundle, and a real server on a real port."""

import asyncio
import contextlib
import io
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from chromium import browser  # noqa: F401  a fixture of the tests of the web page
from fastapi import FastAPI
from PIL import Image

from refract.augment.preprocess import Preprocess
from refract.models.bundle.bundle import Bundle, BundleInfo, GoldenSample, load_bundle, save_bundle
from refract.models.classifier import Classifier, probabilities
from refract.models.registry import build
from refract.pipeline.data.manifest import Manifest, Sample
from refract.pipeline.training.training_features import training_features_of
from refract.serve.http.app import create_app
from refract.serve.http.transport.connection import Connection
from refract.serve.http.transport.server import Server, listen, url
from refract.serve.metrics import Metrics
from refract.serve.requests.limits import Limits
from refract.serve.runtime.engine import Engine
from refract.serve.runtime.service import Service

PREPROCESS = Preprocess(height=32, width=32)
TEMPERATURE = 0.05  # sharpens the near-uniform outputs of an untrained network, and reveals a missing division by it


def encode_image(seed: int, *, size: tuple[int, int] = (40, 56), form: str = "JPEG") -> bytes:
    """An encoded image of `size` (width, height): smooth colours, different for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(buffer, form)
    return buffer.getvalue()


def answer_of(classifier: Classifier, data: bytes, task: str) -> np.ndarray:
    """The probabilities of one image, without any of the server's code."""
    images = torch.from_numpy(PREPROCESS(data)).permute(2, 0, 1)[None].contiguous()
    with torch.inference_mode():
        return probabilities(classifier(images), task=task, temperature=TEMPERATURE)[0].numpy()


@pytest.fixture
def inference_threads() -> Callable[[], list[threading.Thread]]:
    """The threads of engines that were started since the test began and still run."""
    before = set(threading.enumerate())
    return lambda: [thread for thread in threading.enumerate() if thread.name == "inference" and thread not in before]


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Bundle]:
    """Save a bundle of an untrained lenet5. wrong: added to the probabilities of each golden sample; training: with training features."""

    def make(
        path: Path,
        *,
        task: str = "multiclass",
        thresholds: Sequence[float] = (),
        wrong: float = 0.0,
        seed: int = 0,
        word: str = "class",
        training: bool = False,
    ) -> Bundle:
        torch.manual_seed(seed)
        network = build("lenet5", 10, image_size=(32, 32))
        classifier = Classifier(network, mean=PREPROCESS.mean, std=PREPROCESS.std).eval()
        golden_samples = []
        for i in range(3):
            answer = np.clip(answer_of(classifier, encode_image(i), task) + wrong, 0, 1)
            golden_samples.append(GoldenSample(f"{i:02}.jpg", encode_image(i), tuple(answer.tolist())))
        info = BundleInfo(
            name="shapes",
            task=task,
            labels=tuple(f"{word} {i}" for i in range(10)),
            network={"name": "lenet5", "image_size": [32, 32], "args": {}},
            preprocess=PREPROCESS.to_dict(),
            temperature=TEMPERATURE,
            thresholds=tuple(thresholds),
            metrics={"top1": 0.1},
            versions={"torch": torch.__version__},
            created="2025-01-01T00:00:00+00:00",
        )
        features = training_features_of(classifier, PREPROCESS, training_data(info), task=task) if training else None
        return load_bundle(save_bundle(path, info, classifier, golden_samples, training=features))

    return make


def training_data(info: BundleInfo) -> Manifest:
    """40 training and 20 validation images."""
    parts = {"train": range(40), "val": range(40, 60)}
    samples = [
        Sample(f"{split}/{number}.jpg", (number % 10,), split, data=encode_image(number))
        for split, numbers in parts.items()
        for number in numbers
    ]
    return Manifest("memory", tuple(samples), info.labels, info.task)


@pytest.fixture(scope="session")
def make_image() -> Callable[..., bytes]:
    return encode_image


@pytest.fixture(scope="session")
def reference() -> Callable[[Classifier, bytes, str], np.ndarray]:
    return answer_of


@pytest.fixture(scope="session")
def serving() -> Callable[[FastAPI], contextlib.AbstractContextManager[httpx.Client]]:
    return serve_app


@pytest.fixture(scope="session")
def bundle(make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "shapes")


@pytest.fixture(scope="session")
def running(bundle: Bundle) -> Iterator[httpx.Client]:
    """A server with small limits, for the tests that leave it as it was."""
    limits = Limits(max_body_bytes=1_000_000, max_images=4)
    with serve_app(create_app(bundle, limits=limits)) as client:
        yield client


@pytest.fixture(scope="session")
def other(make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with the same labels and other weights."""
    return make_bundle(tmp_path_factory.mktemp("other") / "shapes", seed=1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache of backend choices. PyTorch's number of threads is restored afterwards."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("REFRACT_CACHE_DIR", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield tmp_path / "cache" / "backends"
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def served() -> Callable[[Engine, Callable[[Service], Awaitable[None]]], None]:
    return serve_engine


def serve_engine(engine: Engine, story: Callable[[Service], Awaitable[None]]) -> None:
    """Run the coroutine `story` with a started service."""

    async def main() -> None:
        service = Service(engine, limits=Limits(), metrics=Metrics())
        await service.start()
        try:
            await story(service)
        finally:
            await service.stop()

    asyncio.run(main())


@contextlib.contextmanager
def serve_app(app: FastAPI) -> Iterator[httpx.Client]:
    """Run `app` on a free port in a thread; yield a client, and stop gracefully."""
    ready, bound = threading.Event(), listen("127.0.0.1", 0)
    server = Server(app, on_ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    with httpx.Client(base_url=url(bound), timeout=30, trust_env=False) as client:
        thread.start()
        try:
            assert ready.wait(30), "the server did not start"
            yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def server_connections(monkeypatch: pytest.MonkeyPatch) -> list[Connection]:
    """The server's Connection objects, in the order of their creation."""
    connections: list[Connection] = []
    connection_made = Connection.connection_made
    monkeypatch.setattr(
        Connection,
        "connection_made",
        lambda self, transport: (connections.append(self), connection_made(self, transport)),
    )
    return connections
