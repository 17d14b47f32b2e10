"""What a server has done, for Prometheus. Knows nothing of HTTP's details, nor of images."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app, start_http_server

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication

    from refract.serve.runtime.gpus import Gpu

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class Metrics:
    """Counters of one server, in a registry of their own.

    requests by their end (`ok` or a problem's code), seconds of requests and of their stages, sizes of batches, confidences, answers by
    label, answers to be left to a person; of a challenger how its answers ended or agreed, and their seconds; by `watch` what is in the
    house and waits.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("refract_requests", "Requests for predictions by their end", ["end"], **own)
        self._seconds = Histogram("refract_request_seconds", "Of answered requests", buckets=_SECONDS, **own)
        self._stages = Histogram("refract_stage_seconds", "Of their stages", ["stage"], buckets=_SECONDS, **own)
        self._batches = Histogram(
            "refract_batch_images", "Images in a batch that was to be answered", buckets=_IMAGES, **own
        )
        self._confidence = Histogram("refract_confidence", "Of the likeliest label", buckets=_SHARES, **own)
        self._labels = Counter("refract_predictions", "Images by their likeliest label", ["label"], **own)
        self._abstained = Counter("refract_abstained", "Answers to be left to a person", **own)
        self._swaps = Counter("refract_swaps", "Changes of the model by their end", ["end"], **own)
        # To look a label up costs more than to count.
        self._ok, self._stage, self._label = (
            self._requests.labels("ok"),
            cache(self._stages.labels),
            cache(self._labels.labels),
        )
        self._sampled = Counter("refract_sampled", "Images that were drawn to be kept, by their end", ["end"], **own)
        self._challenged = Counter("refract_challenger_images", "Of the challenger by their end", ["end"], **own)
        self._challenger_seconds = Histogram("refract_challenger_seconds", "Of its answers", buckets=_SECONDS, **own)
        self._challenger = Gauge("refract_challenger", "1 for what challenges", ["name", "digest"], **own)
        self._gpu = Gauge("refract_gpu", "1 for each GPU that computes", ["device", "name", "driver"], **own)
        self._gpu_bytes = Gauge(
            "refract_gpu_bytes", "Memory of a GPU; tensors hold `allocated`", ["device", "kind"], **own
        )
        self._model = Gauge("refract_model", "1 for what is served", ["name", "digest"], **own)

    def answered(self, seconds: float, stages: dict[str, float]) -> None:
        """A request was answered."""
        self._ok.inc()
        self._seconds.observe(seconds)
        for stage, value in stages.items():
            self._stage(stage).observe(value)

    def refused(self, code: str) -> None:
        """A request ended in a problem."""
        self._requests.labels(code).inc()

    def computed(self, images: int) -> None:
        """A batch went through the network, for answers."""
        self._batches.observe(images)

    def predicted(self, probabilities: np.ndarray, labels: Sequence[str], abstained: int) -> None:
        """probabilities: N×C; abstained: how many of the N should be left to a person."""
        for row in probabilities:
            best = int(row.argmax())
            self._label(labels[best]).inc()
            self._confidence.observe(float(row[best]))
        if abstained:
            self._abstained.inc(abstained)

    def sampled(self, end: str) -> None:
        """end: `kept`, `dropped` where too much waited, or `failed`."""
        self._sampled.labels(end).inc()

    def serves(self, name: str, digest: str) -> None:
        """What is served from now on."""
        self._model.clear()
        self._model.labels(name, digest[:16]).set(1)

    def swapped(self, end: str) -> None:
        """end: `done` or `refused`."""
        self._swaps.labels(end).inc()

    def challenges(self, name: str, digest: str) -> None:
        """What challenges it from now on."""
        self._challenger.clear()
        self._challenger.labels(name, digest[:16]).set(1)

    def challenged(self, end: str, images: int, seconds: float | None = None) -> None:
        """end: `answered` by the challenger; `agreed` or `differed`, `failed` or `skipped`, where it was asked after the answer."""
        self._challenged.labels(end).inc(images)
        if seconds is not None:
            self._challenger_seconds.observe(seconds)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge `refract_NAME` that is read when it is asked for."""
        Gauge(f"refract_{name}", text, registry=self.registry).set_function(value)

    def watch_gpu(self, device: str, name: str, driver: str | None, look: "Callable[[], Sequence[Gpu]]") -> None:
        """Gauges of one GPU's memory, which `look` reads when they are asked for."""
        self._gpu.labels(device, name, driver or "").set(1)
        for kind in ("total", "free", "allocated"):
            self._gpu_bytes.labels(device, kind).set_function(partial(_of_first, look, kind))

    def listen(self, host: str, port: int) -> int:
        """Answer Prometheus at `/metrics` on a port of its own, in a thread. Returns the port, for 0 a free one. OSError where taken."""
        server, _ = start_http_server(port, host, self.registry)
        server.set_app(_with_head(make_wsgi_app(self.registry)))
        return int(server.server_port)


def _of_first(look: "Callable[[], Sequence[Gpu]]", kind: str) -> float:
    return float(getattr(look()[0], kind))


def _with_head(app: "WSGIApplication") -> "WSGIApplication":
    """Answer HEAD as GET, without the body: Prometheus' own application refuses it."""

    def answer(environ: dict[str, Any], start_response: "StartResponse") -> Iterable[bytes]:
        started: list[tuple[str, list[tuple[str, str]]]] = []
        head = environ["REQUEST_METHOD"] == "HEAD"
        given = {**environ, "REQUEST_METHOD": "GET"} if head else environ
        body = b"".join(app(given, lambda status, headers, *_: started.append((status, headers))))  # type: ignore[arg-type]
        ((status, headers),) = started
        headers = [(name, "GET, HEAD, OPTIONS" if name == "Allow" else value) for name, value in headers]
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return [] if head else [body]

    return answer
