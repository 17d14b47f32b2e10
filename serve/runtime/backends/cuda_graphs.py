"""CUDA graphs: record the kernels of a batch once for each of a few batch sizes, and launch them by one call.

The time of a small batch on a fast GPU is bound by the launch of each kernel in Python and the driver.
"""

import threading
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from refract.models.features import FeatureClassifier
from refract.serve.runtime.backends.base import Backend, Forward
from refract.serve.runtime.backends.torch_backends import half

LARGEST = 256
"""Images of the largest recorded batch. Larger batches are computed without a graph."""

WARM_UPS = 3
"""Calls before the recording, in which libraries choose their algorithms."""


class Recorded(NamedTuple):
    """A graph, with the tensors that it reads and writes."""

    graph: "torch.cuda.CUDAGraph"
    inputs: Tensor
    outputs: tuple[Tensor, Tensor]


class Graphs:
    """A `Forward` that pads a batch to the next power of two and replays the graph of that size. It records each graph at the first use."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._recorded: dict[int, Recorded] = {}
        self._replay_lock = threading.Lock()  # a graph has one input tensor
        self._pool = torch.cuda.graph_pool_handle()  # graphs do not run concurrently, so they share memory
        self._done: torch.cuda.Event | None = None

    def __call__(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the embedding of the batch in new tensors."""
        count, size = len(batch), padded(len(batch))
        if size > LARGEST:
            return self._forward(batch)
        with self._replay_lock, torch.cuda.device(batch.device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)  # another thread's stream may still compute
            recorded = self._recorded.get(size) or self._record(size, batch)
            recorded.inputs[:count].copy_(batch, non_blocking=True)
            recorded.graph.replay()
            logits, embedding = (output[:count].clone() for output in recorded.outputs)
            self._done = stream.record_event()
        return logits, embedding

    def _record(self, size: int, like: Tensor) -> Recorded:
        inputs = torch.zeros((size, *like.shape[1:]), dtype=like.dtype, device=like.device)
        side, stream = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._forward(inputs)
        stream.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads continue to use the GPU during the capture, for example while a new model is loaded.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self._forward(inputs)
        self._recorded[size] = Recorded(graph, inputs, outputs)
        return self._recorded[size]


def padded(count: int) -> int:
    """Return the smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def _build(network: FeatureClassifier, images: Tensor, folder: Path) -> Forward:
    return Graphs(half(network, images, torch.bfloat16))


BACKENDS = (Backend("cuda-graphs", _build, ("cuda",), embeds=True),)
