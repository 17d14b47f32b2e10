"""The latency of networks for one sample on this machine."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from refract.models.bundle.bundle import Bundle
from refract.pipeline.data.manifest import Sample

TRIES = 50
"""Measurements of a network's latency for one sample."""


@dataclass(frozen=True)
class Latency:
    """Latencies of one sample in ms, of TRIES calls. Other load on the machine lengthens the median more than the shortest one."""

    shortest: float
    median: float


def latencies(calls: Sequence[Callable[[], object]]) -> list[Latency]:
    """Measure the calls, which take turns, so that other load on the machine meets all of them."""
    measured: list[list[float]] = [[] for _ in calls]
    for _ in range(TRIES):
        for times, call in zip(measured, calls, strict=True):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    return [Latency(min(times), statistics.median(times)) for times in measured]


def bundle_call(bundle: Bundle, sample: Sample) -> Callable[[], object]:
    """Return a call of the network on one preprocessed sample, on the CPU. BundleError and ImageError if it cannot be prepared."""
    import torch

    from refract.models.multimodal.tokens import pad_rows
    from refract.pipeline.inference.scoring import preprocess_of

    classifier, preprocess = bundle.classifier(), preprocess_of(bundle.info)
    image = None
    if "images" in classifier.reads:
        image = torch.from_numpy(preprocess(sample.read())).permute(2, 0, 1)[None]
    text_inputs = []
    if classifier.tokens is not None:
        text_inputs = [
            torch.from_numpy(pad_rows([classifier.tokens(sample.text)[0]])),
            torch.tensor([sample.has_image]),
        ]

    def call() -> object:
        with torch.inference_mode():
            return classifier(image, *text_inputs)

    return call
