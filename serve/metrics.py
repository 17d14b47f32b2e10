"""Prometheus metrics of one server."""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app, start_http_server

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication

    from refract.models.bundle.bundle import Bundle
    from refract.serve.runtime.gpus import Gpu

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)
_PROBABILITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class Metrics:
    """The metrics of one server, in a separate registry.

    Requests by outcome (`ok` or the problem's code), durations of requests and of their stages, batch sizes, confidences, predictions by
    label, abstentions, unfamiliar images, hot swaps, feedback, captured samples, cached responses; the served
    model, its age and its accuracy on its test set; outcomes, agreement and durations of the challenger. `watch` adds gauges.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter(
            "refract_requests", "Prediction requests by outcome: `ok` or the code of the problem", ["end"], **options
        )
        self._seconds = Histogram(
            "refract_request_seconds", "Duration of answered requests", buckets=_SECONDS, **options
        )
        self._stages = Histogram(
            "refract_stage_seconds",
            "Duration of each stage of answered requests",
            ["stage"],
            buckets=_SECONDS,
            **options,
        )
        self._batches = Histogram(
            "refract_batch_images", "Images in a batch computed for requests", buckets=_IMAGES, **options
        )
        self._confidence = Histogram(
            "refract_confidence", "Probability of the most probable label", buckets=_PROBABILITIES, **options
        )
        self._labels = Counter("refract_predictions", "Images by their most probable label", ["label"], **options)
        self._abstained = Counter(
            "refract_abstained", "Predictions below abstain_below or min_familiarity, for a person to decide", **options
        )
        self._unfamiliar = Counter(
            "refract_unfamiliar", "Predictions whose familiarity is below min_familiarity", **options
        )
        self._swaps = Counter(
            "refract_swaps", "Hot swaps of the model by outcome: `done` or `refused`", ["end"], **options
        )
        # Looking up a label set costs more than counting, so the children are cached.
        self._ok, self._stage, self._label = (
            self._requests.labels("ok"),
            cache(self._stages.labels),
            cache(self._labels.labels),
        )
        self._feedback = Counter(
            "refract_feedback",
            "Feedback by outcome: `accepted`, `replaced` (a second one for a prediction), or the code of the problem",
            ["end"],
            **options,
        )
        self._sampled = Counter(
            "refract_sampled", "Sampled images by outcome: `kept`, `dropped` or `failed`", ["end"], **options
        )
        self._cached = Counter(
            "refract_cache_requests", "Requests looked up in the response cache: `hit` or `miss`", ["end"], **options
        )
        self._challenged = Counter(
            "refract_challenger_images", "Images of the challenger by outcome", ["end"], **options
        )
        self._challenger_seconds = Histogram(
            "refract_challenger_seconds", "Duration of the challenger's predictions", buckets=_SECONDS, **options
        )
        self._challenger = Gauge("refract_challenger", "1 for the challenging model", ["name", "digest"], **options)
        self._gpu = Gauge("refract_gpu", "1 for each GPU in use", ["device", "name", "driver"], **options)
        self._gpu_bytes = Gauge(
            "refract_gpu_bytes",
            "GPU memory: `total`, `free`, and `allocated` by tensors",
            ["device", "kind"],
            **options,
        )
        self._model = Gauge("refract_model", "1 for the served model", ["name", "digest"], **options)
        self._created = Gauge(
            "refract_model_created_seconds", "Unix time of the served model's training", ["digest"], **options
        )
        self._test_accuracy = Gauge(
            "refract_test_accuracy",
            "Accuracy of the served model on its test set; subset accuracy of a multi-label model",
            ["digest"],
            **options,
        )
        for end in ("done", "refused"):  # Prometheus sees no increase if a series starts with 1
            self._swaps.labels(end)

    def looked_up(self, end: str) -> None:
        """Count a request that may be in the response cache. end: `hit` or `miss`."""
        self._cached.labels(end).inc()

    def answered(self, seconds: float, stages: dict[str, float]) -> None:
        """Count an answered request. seconds: its duration; stages: the duration of each stage in seconds."""
        self._ok.inc()
        self._seconds.observe(seconds)
        for stage, value in stages.items():
            self._stage(stage).observe(value)

    def refused(self, code: str) -> None:
        """Count a request that ended in a problem."""
        self._requests.labels(code).inc()

    def computed(self, images: int) -> None:
        """Count a batch that the network computed for requests."""
        self._batches.observe(images)

    def predicted(self, probabilities: np.ndarray, labels: Sequence[str], abstained: int, unfamiliar: int = 0) -> None:
        """Count the predictions of a request. probabilities: N×C; abstained: the number of the N predictions that abstain; unfamiliar: of
        those, because of their familiarity."""
        for row in probabilities:
            index = int(row.argmax())
            self._label(labels[index]).inc()
            self._confidence.observe(float(row[index]))
        if abstained:
            self._abstained.inc(abstained)
        if unfamiliar:
            self._unfamiliar.inc(unfamiliar)

    def judged(self, end: str) -> None:
        """Count feedback. end: `accepted`, `replaced`, or the code of the problem."""
        self._feedback.labels(end).inc()

    def sampled(self, end: str) -> None:
        """Count a sampled image. end: `kept`, `dropped` if too many images waited, or `failed`."""
        self._sampled.labels(end).inc()

    def serves(self, bundle: "Bundle") -> None:
        """Set the served model."""
        info, digest = bundle.info, bundle.digest[:16]
        for gauge in (self._model, self._created, self._test_accuracy):
            gauge.clear()
        self._model.labels(info.name, digest).set(1)
        self._created.labels(digest).set(datetime.fromisoformat(info.created).timestamp())
        accuracy = info.metrics.get("subset_accuracy" if info.task == "multilabel" else "accuracy")
        if accuracy is not None:
            self._test_accuracy.labels(digest).set(accuracy)

    def swapped(self, end: str) -> None:
        """Count a hot swap. end: `done` or `refused`."""
        self._swaps.labels(end).inc()

    def challenges(self, bundle: "Bundle") -> None:
        """Set the challenging model."""
        self._challenger.clear()
        self._challenger.labels(bundle.info.name, bundle.digest[:16]).set(1)

    def challenged(self, end: str, images: int, seconds: float | None = None) -> None:
        """Count images of the challenger. end: `answered` for a canary request; `agreed`, `differed`, `failed` or `skipped` for a shadow
        request."""
        self._challenged.labels(end).inc(images)
        if seconds is not None:
            self._challenger_seconds.observe(seconds)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge `refract_NAME`; `value` is called at each scrape. text: its HELP line."""
        Gauge(f"refract_{name}", text, registry=self.registry).set_function(value)

    def watch_gpu(self, device: str, name: str, driver: str | None, read: "Callable[[], Sequence[Gpu]]") -> None:
        """Add gauges of one GPU's memory; `read` is called at each scrape."""
        self._gpu.labels(device, name, driver or "").set(1)
        for kind in ("total", "free", "allocated"):
            self._gpu_bytes.labels(device, kind).set_function(partial(_memory, read, kind))

    def listen(self, host: str, port: int) -> int:
        """Serve `/metrics` on a separate port, from a thread. Returns the port; 0 selects a free one. OSError if the port is taken."""
        server, _ = start_http_server(port, host, self.registry)
        server.set_app(_with_head(make_wsgi_app(self.registry)))
        return int(server.server_port)


def _memory(read: "Callable[[], Sequence[Gpu]]", kind: str) -> float:
    return float(getattr(read()[0], kind))


def _with_head(app: "WSGIApplication") -> "WSGIApplication":
    """Answer HEAD like GET without the body; the application of `prometheus_client` rejects HEAD."""

    def answer(environ: dict[str, Any], start_response: "StartResponse") -> Iterable[bytes]:
        started: list[tuple[str, list[tuple[str, str]]]] = []
        head = environ["REQUEST_METHOD"] == "HEAD"
        request = {**environ, "REQUEST_METHOD": "GET"} if head else environ
        body = b"".join(app(request, lambda status, headers, *_: started.append((status, headers))))  # type: ignore[arg-type]
        ((status, headers),) = started
        headers = [(name, "GET, HEAD, OPTIONS" if name == "Allow" else value) for name, value in headers]
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return [] if head else [body]

    return answer
